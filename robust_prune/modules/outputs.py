"""What comes out of a module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robust_prune.modules.contexts import evaluating
from robust_prune.modules.layout import device_of
from robust_prune.modules.memory import as_memory_allows


@torch.no_grad()
def outputs_of(model: nn.Module, images: Tensor) -> int:
    """Return how many classes the model tells apart, from images [N, C, H, W] of its data."""
    with evaluating(model):
        logits: Tensor = model(images[:1].to(device_of(model)))
    return logits.shape[1]


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return the running means and variances of all batch norms."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    found = [t for layer in layers for t in (layer.running_mean, layer.running_var)]
    return [t for t in found if t is not None]


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among values, looking into lists, tuples and mappings."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping):
            found += tensors_in(list(value.values()))
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def difference(found: object, expected: object) -> float:
    """Return the largest difference of outputs over the largest entry; inf where not comparable."""
    one, two = tensors_in((found,)), tensors_in((expected,))
    if not one or [t.shape for t in one] != [t.shape for t in two]:
        return math.inf
    errors = [
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
        for a, b in zip(one, two, strict=True)
        if a.is_floating_point() and a.numel()
    ]
    return max((e if e == e else math.inf for e in errors), default=math.inf)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Return the classes [N] predicted in eval mode, on the CPU."""
    device = device_of(model)

    def run(size: int) -> Tensor:
        parts = torch.split(images, size)
        return torch.cat([model(part.to(device)).argmax(1).cpu() for part in parts])

    with evaluating(model):
        return as_memory_allows(run, min(batch_size, max(1, len(images))), "predictions")
