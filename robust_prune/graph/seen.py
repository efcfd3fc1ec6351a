"""What modules read and gave in a pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robust_prune.graph.costs import example_image
from robust_prune.modules import evaluating

IMAGES = 2
Run = Callable[[nn.Module, int], Any]  # passes so many images through a network


def passing(input_size: tuple[int, int, int]) -> Run:
    """Return what passes different images of this size."""

    def run(net: nn.Module, images: int) -> Any:
        image = example_image(net, input_size)
        return net(torch.cat([image, 1 - image, image.flip(-1)][:images]))

    return run


@dataclass(frozen=True)
class Seen:
    """What a module read and gave in a pass, and what its children gave that read the same."""

    x: Tensor
    y: Tensor
    children: dict[str, Tensor] = field(default_factory=dict)


def seen_in(net: nn.Module, modules: Iterable[str], run: Run) -> dict[str, Seen]:
    """Run a network and return what modules read and gave, of those that one tensor goes through.

    Args:
        net: left as it was.
        modules: names of those to look at.
        run: passes images through it.
    """
    watchers = {name: _Watcher() for name in modules}
    handles: list[Any] = []
    for name, watcher in watchers.items():
        module = net.get_submodule(name)
        handles.append(module.register_forward_pre_hook(watcher.enter, with_kwargs=True))
        for child, part in module.named_children():
            beside = functools.partial(watcher.beside, child)
            handles.append(part.register_forward_hook(beside))
        handles.append(module.register_forward_hook(watcher.leave))
    try:
        with evaluating(net):
            run(net, IMAGES)
    finally:
        for handle in handles:
            handle.remove()
    return {name: watcher.seen for name, watcher in watchers.items() if watcher.seen is not None}


class _Watcher:
    """Looks at one module while its network runs; `seen` is None unless one call was all."""

    def __init__(self) -> None:
        self.seen: Seen | None = None
        self.calls = 0
        self.x: Tensor | None = None
        self.children: dict[str, Tensor] = {}

    def enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls += 1
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        self.x = args[0].clone() if alone else None

    def beside(self, child: str, _: nn.Module, args: Any, y: Any) -> None:
        """Keep what a child gave of the very input of the module."""
        pair = (*args, y)
        if self.x is None or len(pair) != 2 or not all(isinstance(t, Tensor) for t in pair):
            return
        if args[0].shape == self.x.shape and torch.equal(args[0], self.x):
            self.children[child] = y

    def leave(self, _: nn.Module, args: Any, y: Any) -> None:
        one = self.calls == 1 and self.x is not None and isinstance(y, Tensor)
        self.seen = Seen(self.x, y.clone(), self.children) if one else None  # type: ignore[arg-type]
