"""Layers that can be fitted: which they are, and what they read and give at sampled positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.modules import network_of

MOST_INPUTS = 4608  # in-channels times kernel size; beyond, the normal equations get too large
PATCH_BYTES = 1 << 28
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def fittable(model: nn.Module) -> dict[str, nn.Module]:
    """Return by name the layers that one call with plain weights of their own computes."""
    net = network_of(model)
    weights = [id(p) for _, m in net.named_modules() for p in m.parameters(recurse=False)]
    found: dict[str, nn.Module] = {}
    for name, layer in net.named_modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, nn.Parameter) or weights.count(id(weight)) > 1:
            continue
        plain = type(layer).forward is nn.Linear.forward or (
            type(layer).forward is nn.Conv2d.forward
            and isinstance(layer, nn.Conv2d)
            and layer.groups == 1
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        )
        if plain and weight[0].numel() <= MOST_INPUTS:
            found[name] = layer
    return found


def places_of(layer: nn.Module, y: Tensor) -> int:
    """Return at how many places a layer's output (or a linear layer's input) has channels."""
    if isinstance(layer, nn.Conv2d):
        return y.shape[-1] * y.shape[-2]
    return y[0].numel() // y.shape[-1]


def outputs_at(layer: nn.Module, y: Tensor, positions: Tensor | None) -> Tensor:
    """Return [rows, out]: what a layer gave at these positions; None takes all."""
    y = y.flatten(2).transpose(1, 2) if isinstance(layer, nn.Conv2d) else _tokens(y)
    y = y if positions is None else y[:, positions]
    return y.reshape(-1, y.shape[-1]).clone()


def inputs_at(layer: nn.Module, x: Tensor, positions: Tensor | None) -> Tensor:
    """Return [rows, in]: what the outputs at these positions are made of; None takes all."""
    if not isinstance(layer, nn.Conv2d):
        x = _tokens(x)
        x = x if positions is None else x[:, positions]
        return x.reshape(-1, x.shape[-1])
    assert isinstance(layer, nn.Conv2d)
    if positions is not None:
        return _patches_at(layer, x, positions)
    parts = []
    patch_bytes = 4 * x[0].numel() * layer.kernel_size[0] * layer.kernel_size[1]
    for part in torch.split(x, max(1, PATCH_BYTES // patch_bytes)):
        patches = F.unfold(
            part,
            layer.kernel_size,
            dilation=layer.dilation,
            padding=layer.padding,  # type: ignore[arg-type]
            stride=layer.stride,
        )
        parts.append(patches.transpose(1, 2).reshape(-1, patches.shape[1]))
    return torch.cat(parts)


def _patches_at(layer: nn.Conv2d, x: Tensor, positions: Tensor) -> Tensor:
    """Return the rows of `F.unfold` at a few places, without unfolding the others."""
    up, left = (int(padding) for padding in layer.padding)
    x = F.pad(x, (left, left, up, up))
    (high, wide), (down, across) = layer.kernel_size, layer.stride
    places_across = (x.shape[3] - layer.dilation[1] * (wide - 1) - 1) // across + 1
    first = torch.stack([positions // places_across * down, positions % places_across * across])
    rows = first[0].view(-1, 1, 1) + layer.dilation[0] * _counted(high, x).view(1, -1, 1)
    columns = first[1].view(-1, 1, 1) + layer.dilation[1] * _counted(wide, x).view(1, 1, -1)
    places = (rows * x.shape[3] + columns).flatten()
    patches = x.flatten(2).index_select(2, places).view(*x.shape[:2], len(positions), -1)
    return patches.transpose(1, 2).reshape(-1, x.shape[1] * high * wide)


def _counted(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device)


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1, x.shape[-1])
