"""What a network is run on while it is traced and tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robust_prune.modules import tensors_in


@dataclass(frozen=True)
class Example:
    """Inputs of a network, and how it takes them.

    `forward(network, inputs)` runs it; without, a tensor is its only argument, a list or tuple
    its positional ones, a mapping its keywords.
    """

    inputs: Any
    forward: Callable[[nn.Module, Any], Any] | None = None

    def run(self, net: nn.Module) -> Any:
        """Return what the network gives."""
        if self.forward is not None:
            return self.forward(net, self.inputs)
        if isinstance(self.inputs, Mapping):
            return net(**self.inputs)
        if isinstance(self.inputs, (list, tuple)):
            return net(*self.inputs)
        return net(self.inputs)

    def paired(self) -> Example:
        """Return two of a batch of one: some networks take no less in train mode."""
        return self._with(_pair)

    @property
    def dtype(self) -> torch.dtype:
        """What its floating-point numbers are in."""
        floating = [t.dtype for t in tensors_in((self.inputs,)) if t.is_floating_point()]
        return floating[0] if floating else torch.float32

    def computes_in_less(self, net: nn.Module) -> bool:
        """Run a network in float64, and return whether a part of it computes in less."""
        less = _Less()
        with less:
            self.run(net)
        return less.found

    def to(self, dtype: torch.dtype) -> Example:
        """Return the example with other floating-point numbers."""
        return self._with(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def without_values(self) -> Example:
        """Return the example on the meta device, where only shapes are computed."""
        return self._with(lambda t: t.to("meta"))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Example:
        return replace(self, inputs=_mapped(self.inputs, change))


class _Less(TorchDispatchMode):
    """Looks whether operations give floating-point numbers of less than 64 bits."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found |= any(
            t.is_floating_point() and t.dtype != torch.float64 for t in tensors_in((out,))
        )
        return out


def _pair(tensor: Tensor) -> Tensor:
    single = tensor.ndim > 0 and len(tensor) == 1
    return tensor.expand(2, *tensor.shape[1:]).clone() if single else tensor


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the same nest of mappings, lists and tuples with other tensors in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(item, change) for item in value)
    return value
