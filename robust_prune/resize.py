"""Give the layers of a freshly built network the widths that a state_dict has."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def fit_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Resize every parameter and buffer of `model` to the shape of its namesake in `state`.

    The fields that layers keep of their own widths follow the new shapes, so that a pruned
    network prints, counts and prunes again like any other. Values are left undefined; load the
    state_dict afterwards with strict=True, which also finds names that don't match.
    """
    for prefix, module in model.named_modules():
        shapes = {
            name: tuple(state[key].shape)
            for name, _ in _own_tensors(module)
            if (key := f"{prefix}.{name}" if prefix else name) in state
        }
        changed = {n: s for n, s in shapes.items() if tuple(getattr(module, n).shape) != s}
        if changed:
            _set_fields(module, shapes)
            for name, shape in changed.items():
                _replace(module, name, shape)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ]


def _replace(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    old = getattr(module, name)
    new = torch.empty(shape, dtype=old.dtype, device=old.device)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(module, name, new)


def _set_fields(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    weight = shapes.get("weight", ())
    if isinstance(module, _ConvNd) and weight:
        if module.groups == module.in_channels == module.out_channels:
            module.groups = weight[0]  # depthwise: one group a channel, before and after
        first, second = weight[0], weight[1] * module.groups
        transposed = isinstance(module, _ConvTransposeNd)
        module.in_channels = first if transposed else second
        module.out_channels = second if transposed else first
    elif isinstance(module, nn.Linear) and weight:
        module.out_features, module.in_features = weight
    elif isinstance(module, _BatchNorm):
        module.num_features = next(shape[0] for shape in shapes.values() if shape)
    elif isinstance(module, nn.LayerNorm) and weight:
        module.normalized_shape = weight
    elif isinstance(module, nn.GroupNorm) and weight:
        module.num_channels = weight[0]
