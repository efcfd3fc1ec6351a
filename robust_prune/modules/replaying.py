"""Passes that differ from one before only behind a layer: what lies in front is not computed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from robust_prune.modules.image_model import network_of


@dataclass
class _Call:
    """When a module ran in a pass, and what it gave."""

    start: int
    end: int = 0
    several: bool = False
    given: Tensor | None = None
    version: int = 0

    @property
    def whole(self) -> Tensor | None:
        """What it gave, if it ran once and nothing has written into that since."""
        intact = self.given is not None and self.given._version == self.version
        return self.given if intact and not self.several else None


@dataclass
class Replay:
    """Modules' outputs in one pass of a model in eval mode, for passes on the same images.

    Modules that end before any layer of a change begins give what they gave; those inside of them
    do not run. What can't be given again is computed: several outputs, modules that run twice,
    outputs that code behind them writes into.

    Attributes:
        model: whose weights change between passes.
        most: bytes that are kept, at most; outputs of outer modules come first.
    """

    model: nn.Module
    most: int
    _calls: dict[str, _Call] = field(default_factory=dict)
    _kept: frozenset[str] = frozenset()

    def look_at(self, image: Tensor, images: int) -> None:
        """Find out what runs when, and what can be kept of a pass.

        Args:
            image: [1, C, H, W] in [0, 1].
            images: of later passes, at most.
        """
        names = [name for name, _ in network_of(self.model).named_modules() if name]
        self._kept = frozenset(names)
        self.record(image)
        left, kept = self.most, set[str]()
        for name in sorted(self._calls, key=lambda name: name.count(".")):
            given = self._calls[name].whole
            if given is not None and (size := given.untyped_storage().nbytes() * images) <= left:
                left -= size
                kept.add(name)
        self._kept = frozenset(kept)

    def record(self, images: Tensor) -> Tensor:
        """Pass images [N, C, H, W], and keep what modules give; return logits [N, K]."""
        self._calls = {}
        clock = iter(range(2 * 10**9))

        def run(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = _Call(next(clock), several=name in self._calls)
            self._calls.setdefault(name, call).several |= call.several
            given = forward(*args, **kwargs)
            call.end = next(clock)
            if type(given) is Tensor and name in self._kept and not given.is_inference():
                call.given, call.version = given, given._version
            return given

        modules = dict(network_of(self.model).named_modules())
        forwards = {
            name: functools.partial(run, name, module.forward)
            for name, module in modules.items()
            if name
        }
        with _forwards(self.model, forwards):
            logits: Tensor = self.model(images)
        return logits

    @contextlib.contextmanager
    def before(self, layers: Iterable[str]) -> Iterator[None]:
        """Give again what modules gave that ended before any of these layers began.

        A layer whose weights something else reads counts as what is around it.
        """
        start = min((self._start(layer) for layer in layers), default=0)
        modules = dict(network_of(self.model).named_modules())
        given = {
            name: _once(whole, modules[name].forward)
            for name, call in self._calls.items()
            if call.end < start and (whole := call.whole) is not None
        }
        with _forwards(self.model, given):
            yield

    def forget(self) -> None:
        """Keep nothing of the latest pass."""
        self._calls = {}

    def _start(self, layer: str) -> int:
        while layer and layer not in self._calls:
            layer = layer.rpartition(".")[0]
        return self._calls[layer].start if layer else 0


def _once(given: Tensor, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return what gives again what a module gave, and runs it when it is called once more."""
    left = [given]

    def run(*args: Any, **kwargs: Any) -> Any:
        return left.pop() if left else forward(*args, **kwargs)

    return run


@contextlib.contextmanager
def _forwards(model: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Let modules, by name in the network, run something else."""
    modules = dict(network_of(model).named_modules())
    before = {name: vars(modules[name]).get("forward") for name in forwards}
    try:
        for name, forward in forwards.items():
            modules[name].__dict__["forward"] = forward
        yield
    finally:
        for name, own in before.items():
            if own is None:
                modules[name].__dict__.pop("forward", None)
            else:
                modules[name].__dict__["forward"] = own
