"""What a network is run on while it is traced and tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

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
        return replace(self, inputs=_paired(self.inputs))

    @property
    def dtype(self) -> torch.dtype:
        """What its floating-point numbers are in."""
        floating = [t.dtype for t in tensors_in((self.inputs,)) if t.is_floating_point()]
        return floating[0] if floating else torch.float32

    def to(self, dtype: torch.dtype) -> Example:
        """Return the example with other floating-point numbers."""
        return replace(self, inputs=_converted(self.inputs, dtype))


def _converted(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _converted(item, dtype) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_converted(item, dtype) for item in value)
    return value


def _paired(value: Any) -> Any:
    if isinstance(value, Tensor):
        single = value.ndim > 0 and len(value) == 1
        return value.expand(2, *value.shape[1:]).clone() if single else value
    if isinstance(value, Mapping):
        return {key: _paired(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_paired(item) for item in value)
    return value
