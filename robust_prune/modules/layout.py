"""Where tensors lie: the device of a module, and the layout that a CPU can be trusted with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from robust_prune.modules.contexts import evaluating
from robust_prune.modules.copying import copied

ROUNDING = 1e-4  # relative to the largest logit; float32 through some hundred layers stays below


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


@contextlib.contextmanager
def channels_last(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Run a CPU model's convolutions channels last, in about 0.6 of their time.

    For passes without a gradient: see `plain_layout`. Afterwards weights lie where they lay before,
    with the values that they have then.
    """
    weights: list[Any] = [m.weight for m in model.modules() if wanted and _has_maps(m)]
    before = [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight, own in zip(weights, before, strict=True):
            weight.data = own.copy_(weight.data)


@torch.no_grad()
def takes_channels_last(model: nn.Module, image: Tensor) -> bool:
    """Whether a model is the same channels last on an image [1, C, H, W], and has use for that."""
    if device_of(model).type != "cpu" or not any(_has_maps(m) for m in model.modules()):
        return False
    with evaluating(model):
        expected: Tensor = model(image)
        try:
            with channels_last(model):
                found: Tensor = model(image)
        except Exception:  # noqa: BLE001 - a user's module may raise anything; it then stays
            return False
    return bool((found - expected).abs().max() <= ROUNDING * expected.abs().max())


def _has_maps(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return type(module) is nn.Conv2d and weight is not None and weight.device.type == "cpu"
