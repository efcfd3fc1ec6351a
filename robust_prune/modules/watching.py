"""Looking at layers while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robust_prune.modules.image_model import network_of

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def first_argument(args: Args, kwargs: Kwargs) -> Tensor:
    """Return what a module is called with."""
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


@contextmanager
def watching(
    modules: Mapping[str, nn.Module],
    *,
    before: Callable[[str, nn.Module, Tensor], None] | None = None,
    after: Callable[[str, nn.Module, Tensor, Tensor], None] | None = None,
) -> Iterator[None]:
    """Call a function with the name, the module and its input (and output) at every call."""
    handles: list[Any] = []
    for name, module in modules.items():
        if before is not None:

            def enter(m: nn.Module, args: Args, kwargs: Kwargs, name: str = name) -> None:
                before(name, m, first_argument(args, kwargs))

            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        if after is not None:

            def leave(
                m: nn.Module, args: Args, kwargs: Kwargs, y: Tensor, name: str = name
            ) -> None:
                after(name, m, first_argument(args, kwargs), y)

            handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return all batch norms by their names in the network."""
    return {n: m for n, m in network_of(model).named_modules() if isinstance(m, _BatchNorm)}
