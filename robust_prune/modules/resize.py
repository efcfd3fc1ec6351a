"""Change the widths of a network in place: parameters, buffers, and the fields that follow them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from robust_prune.errors import ModelError
from robust_prune.modules.attention import narrow_attention_
from robust_prune.modules.layout import plain_layout

Fields = dict[str, dict[str, Any]]
KEPT_FIELDS = "_pruned_fields"


@torch.no_grad()
def narrow_(
    modules: Mapping[str, nn.Module],
    keep: Mapping[tuple[str, int], Tensor],
    rows: Mapping[str, Sequence[tuple[Tensor, float]]] | None = None,
    depthwise: Collection[str] = (),
) -> None:
    """Keep only some entries of tensors, and set the layers' fields.

    Tensors are replaced, never written to: another model may share them. Gradients go along.

    Args:
        modules: of a network by their names; changed in place.
        keep: the entries that stay, by (name, dimension).
        rows: by name (rows, factor) that entries of the first dimension are multiplied with.
        depthwise: convolutions that lose a group with a channel. Their numbers don't tell: a
            grouped convolution whose inputs were cut to one a group has the same ones.
    """
    rows = rows or {}
    by_tensor: dict[str, dict[int, Tensor]] = {}
    for (name, dim), indices in keep.items():
        by_tensor.setdefault(name, {})[dim] = indices
    touched: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, dims in by_tensor.items():
        layer, _, leaf = name.rpartition(".")
        module = modules[layer]
        old = getattr(module, leaf)
        data, grad = old.detach().clone() if name in rows else old.detach(), old.grad
        for indices, factor in rows.get(name, ()):
            data[indices.to(data.device)] *= factor
        for dim, indices in dims.items():
            indices = indices.to(data.device)
            data = data.index_select(dim, indices)
            grad = None if grad is None else grad.index_select(dim, indices)
        touched.setdefault(layer, {})[leaf] = tuple(data.shape)
        _replace(module, leaf, plain_layout(data))
        if grad is not None:
            getattr(module, leaf).grad = plain_layout(grad)
    for layer, shapes in touched.items():
        _set_fields(modules[layer], shapes, layer in depthwise)


def fit_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Resize every parameter and buffer of `model` to the shape of its namesake in `state`.

    The fields that layers keep of their own widths follow the new shapes, so that a pruned
    network prints, counts and prunes again like any other. Values are left undefined; load the
    state_dict afterwards with strict=True, which also finds names that don't match. Constant
    vectors that no file holds get as long as the parameters beside them.
    """
    for prefix, module in model.named_modules():
        shapes = {
            name: tuple(state[key].shape)
            for name, _ in _own_tensors(module)
            if (key := f"{prefix}.{name}" if prefix else name) in state
        }
        changed = {n: s for n, s in shapes.items() if tuple(getattr(module, n).shape) != s}
        if changed:
            _shorten_constants(module, changed)
            for name, shape in changed.items():
                old = getattr(module, name)
                _replace(module, name, torch.empty(shape, dtype=old.dtype, device=old.device))
            _set_fields(module, shapes, _is_depthwise(module))


def is_unsaved_constant(module: nn.Module, name: str) -> bool:
    """Whether a buffer has equal rows and is left out of state_dicts.

    Such are the bias of an attention's keys, zero and not learned, beside those of queries and
    values, and the kernels that blur every channel alike. Any rows of it are the same, so that
    its length says all.
    """
    buffer = module._buffers.get(name)
    if buffer is None or name not in module._non_persistent_buffers_set or buffer.ndim == 0:
        return False
    return len(buffer) > 1 and bool((buffer == buffer[:1]).all())


def fields_of(model: nn.Module) -> Fields:
    """Return the numbers that pruning has changed in modules, by module and attribute."""
    found: Fields = getattr(model, KEPT_FIELDS, {})
    return found


def forget_fields_(model: nn.Module) -> None:
    """Remember no numbers of modules that are not there any more."""
    modules = dict(model.named_modules())
    left = {layer: values for layer, values in fields_of(model).items() if layer in modules}
    if left != fields_of(model):
        setattr(model, KEPT_FIELDS, left)


def set_fields_(
    model: nn.Module,
    fields: Mapping[str, Mapping[str, Any]],
    modules: Mapping[str, nn.Module] | None = None,
) -> None:
    """Set numbers of modules, such as the width of an attention's heads, and remember them.

    Args:
        model: changed in place; it remembers.
        fields: the new numbers, by module and attribute. Constant kernels that no file holds get
            as many rows as the number says that was their count.
        modules: those of the model by their names, where the caller has them.

    Raises:
        ModelError: there is no such module or attribute, or it is not a number.
    """
    modules = dict(model.named_modules()) if modules is None else modules
    kept = {layer: dict(values) for layer, values in fields_of(model).items()}
    for layer, values in fields.items():
        for name, value in values.items():
            old = getattr(modules.get(layer), name, None)
            if not _is_number(old) or not _is_number(value):
                raise ModelError(f"{layer or 'the network'} has no number called {name!r} to set")
            if isinstance(old, tuple):
                value = tuple(value)
            _shorten_kernels(modules[layer], old, value)
            setattr(modules[layer], name, value)
            kept.setdefault(layer, {})[name] = list(value) if isinstance(value, tuple) else value
    if kept:
        setattr(model, KEPT_FIELDS, kept)


def _is_number(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(isinstance(v, int) for v in value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _shorten_constants(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Cut constant vectors to what parameters of their length, in the same module, come to."""
    lengths: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for name, parameter in module.named_parameters(recurse=False):
        lengths.setdefault(tuple(parameter.shape), set()).add(
            shapes.get(name, tuple(parameter.shape))
        )
    for name, buffer in list(module.named_buffers(recurse=False)):
        become = lengths.get(tuple(buffer.shape), set())
        if len(become) == buffer.ndim == 1 and is_unsaved_constant(module, name):
            (length,) = become.pop()
            _replace(module, name, buffer[:length].clone())


def _shorten_kernels(module: nn.Module, old: Any, new: Any) -> None:
    """Cut constant kernels of as many rows as a number of their module says with the number."""
    if type(old) is type(new) is int and 0 < new < old:
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.ndim > 2 and len(buffer) == old and is_unsaved_constant(module, name):
                _replace(module, name, buffer[:new].clone())


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ]


def _replace(module: nn.Module, name: str, data: Tensor) -> None:
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(data, requires_grad=old.requires_grad))
    else:
        setattr(module, name, data)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups == module.in_channels > 1


def _set_fields(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], depthwise: bool) -> None:
    weight = shapes.get("weight", ())
    if isinstance(module, _ConvNd) and weight:
        _set_convolution(module, weight, depthwise)
    elif isinstance(module, nn.MultiheadAttention):
        narrow_attention_(module)
    elif isinstance(module, nn.Linear) and weight:
        module.out_features, module.in_features = weight
    elif isinstance(module, _NormBase) or (hasattr(module, "num_features") and len(weight) == 1):
        features = next(shape[0] for shape in shapes.values() if shape)
        module.num_features = features  # type: ignore[assignment]
    elif isinstance(module, nn.GroupNorm) and weight:
        module.num_channels = weight[0]
    elif isinstance(module, nn.PReLU) and weight:
        module.num_parameters = weight[0]
    elif len(getattr(module, "normalized_shape", ())) == 1 and weight:
        module.normalized_shape = weight  # type: ignore[assignment]


def _set_convolution(module: _ConvNd, weight: tuple[int, ...], depthwise: bool) -> None:
    first, second = weight[:2]
    if isinstance(module, _ConvTransposeNd):
        module.in_channels, module.out_channels = first, second * module.groups
    elif depthwise:  # one group a channel, before and after
        multiplier = module.out_channels // module.in_channels
        module.in_channels = module.groups = first // multiplier
        module.out_channels = first
    else:
        module.in_channels, module.out_channels = second * module.groups, first
