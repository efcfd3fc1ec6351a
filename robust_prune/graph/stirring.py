"""Copies of a network with other weights, under which code that takes wrong channels shows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robust_prune.modules import copied


@torch.no_grad()
def stirred_copy(net: nn.Module, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Return a copy in eval mode, its weights such that no branch and no attention is flat.

    With seed 0 matrices are the network's own, scaled; with others they are drawn. Few channels
    behind a ReLU may all be silent under some weights, and hide what is before them.

    Args:
        net: left as it was.
        dtype: of the copy.
        seed: of what is drawn.
    """
    made = _in_type(net, dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        if not tensor.is_floating_point():
            continue
        leaf = name.rpartition(".")[2]
        if isinstance(tensor, nn.Parameter) and tensor.ndim > 1 and not seed:
            spread = float(tensor.std())
            if spread > 0 and math.isfinite(spread):
                tensor.mul_(max(tensor[0].numel(), 1) ** -0.5 / spread)
                continue
        cpu = torch.empty(tensor.shape, dtype=tensor.dtype)
        if leaf == "running_var":
            cpu.uniform_(0.5, 1.5, generator=generator)
        elif leaf == "running_mean" or leaf == "bias":
            cpu.normal_(0, 0.1, generator=generator)
        elif not isinstance(tensor, nn.Parameter):
            continue
        elif tensor.ndim > 1:
            cpu.normal_(0, max(tensor[0].numel(), 1) ** -0.5, generator=generator)
        else:
            cpu.uniform_(0.5, 1.5, generator=generator)
        tensor.copy_(cpu)
    return made


def _in_type(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy, converted as `net.to(dtype)` does, without a copy in between."""
    converted: dict[int, Tensor] = {}
    for tensor in (*net.parameters(), *net.buffers()):
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        twin = tensor.detach().to(kind, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        converted[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
    return copied(net, converted)
