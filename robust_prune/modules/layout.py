"""Where tensors lie: the device of a module, and the layout that a CPU can be trusted with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_prune.modules.copying import copied


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer, CPU where there is none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@torch.no_grad()
def make_contiguous_(model: nn.Module) -> None:
    """Put every parameter and gradient of a CPU model into the contiguous layout."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = plain_layout(parameter.data)
            if parameter.grad is not None:
                parameter.grad = plain_layout(parameter.grad)


def contiguous(model: nn.Module) -> nn.Module:
    """Return the model itself, or a contiguous copy of a CPU model in another layout."""
    if all(p.data.stride() == plain_layout(p.data).stride() for p in model.parameters()):
        return model
    plain = copied(model)
    make_contiguous_(plain)
    return plain


def plain_layout(tensor: Tensor) -> Tensor:
    """Return a CPU tensor in the contiguous layout with its canonical strides.

    torch's CPU convolutions corrupt the heap in the backward pass of narrow layers in the
    channels_last layout. `contiguous()` does not leave that layout where a dimension has size 1
    (grey images, 1x1 kernels): both layouts then count as contiguous, and the strides decide.
    """
    if tensor.device.type != "cpu":
        return tensor
    canonical, step = [], 1
    for size in reversed(tensor.shape):
        canonical.append(step)
        step *= size
    if tensor.stride() == tuple(reversed(canonical)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
