"""What layers and entrywise functions do to the channels of their inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robust_prune.graph.tracing.atoms import zeros
from robust_prune.graph.tracing.tracer import (
    Rule,
    Site,
    Tracer,
    UntraceableError,
    mark_square,
    piece_of,
    square_of,
)
from robust_prune.graph.tracing.uses import argument
from robust_prune.modules import is_unsaved_constant, tensors_in

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register what functions of these names do."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def words(text: str) -> list[str]:
    """Return the words of a text."""
    return text.split()


def full(tracer: Tracer, tensor: Tensor) -> Tensor:
    """Return a label at its tensor's full size, without copying."""
    return tracer.label(tensor).expand(tensor.shape)


@rule("linear")
def _linear(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    piece = piece_of(_given(args, kwargs)[1])
    x, weight, bias = _operands(tracer, args, kwargs) if piece is None else _given(args, kwargs)
    whole, start = (weight, 0) if piece is None else piece
    labels, atoms = tracer.labels, tracer.labels.atoms
    labels.out_dims[id(whole)] = 0
    rows, columns = (labels.axis(whole, dim) for dim in (0, 1))
    rows, first = rows[start : start + len(weight)], rows[: len(weight)]
    atoms.join(rows, first)  # pieces are equally large
    _join_bias(tracer, bias, rows)
    label = tracer.label(x)
    if label.ndim > 1 and len(torch.unique(label)) == label.numel() == x.numel():
        # a bare parameter, such as learned queries: each row has the same channels
        flat = label.reshape(-1, label.shape[-1])
        atoms.join(flat, flat[:1])
    elsewhere = [d for d in tracer.varies(label) if d != label.ndim - 1]
    if elsewhere:
        # it mixes tokens: their number stays, the channels pass
        if len(tracer.varies(label)) > len(elsewhere):
            raise UntraceableError("channels in several dimensions")
        labels.fix(columns, f"mixes tokens in {tracer.owner}")
        labels.fix(rows, f"mixes tokens in {tracer.owner}")
        for dim in elsewhere:
            where = tracer.vector(label.narrow(-1, 0, 1), dim, x.shape[dim])
            labels.uses[id(weight)][-1][1].append(where)
        tracer.set(out, label.narrow(-1, 0, 1))
        return
    atoms.join(columns, tracer.vector(label, -1, x.shape[-1]))
    tracer.set(out, rows.view([1] * (out.ndim - 1) + [-1]))


@rule("conv1d", "conv2d", "conv3d")
def _conv(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    groups = int(argument(args, kwargs, 6, "groups", default=1))
    labels, atoms = tracer.labels, tracer.labels.atoms
    if _is_fixed_kernel(tracer, args, kwargs, groups):
        _filter(tracer, args, kwargs, out)
        return
    x, weight, bias = _operands(tracer, args, kwargs)
    labels.out_dims[id(weight)] = 0
    rows = labels.axis(weight, 0)
    _join_bias(tracer, bias, rows)
    incoming = tracer.vector(tracer.label(x), -out.ndim + 1, x.shape[1])
    if groups == x.shape[1] > 1:
        # depthwise: a channel in is `multiplier` channels out
        atoms.join(rows.view(groups, -1), incoming.view(groups, 1))
    else:
        columns = labels.axis(weight, 1)
        atoms.join(incoming.view(groups, -1), columns.view(1, -1))
        atoms.join(rows.view(groups, -1), rows[: len(rows) // groups].view(1, -1))
    tracer.set(out, rows.view([1, -1] + [1] * (out.ndim - 2)))


def _is_fixed_kernel(tracer: Tracer, args: Args, kwargs: Kwargs, groups: int) -> bool:
    """Whether each channel is filtered by a row of a buffer that pruning can shorten.

    A file has the buffer, or its rows are all the same and the running module says how many.
    """
    x, weight, bias = _given(args, kwargs)
    if id(weight) not in tracer.buffers or bias is not None or not groups == len(weight) > 1:
        return False
    owner = tracer.modules[tracer.owner]
    names = [name for name, buffer in owner.named_buffers(recurse=False) if buffer is weight]
    if not names or groups != x.shape[1]:
        return False
    saved = names[0] not in owner._non_persistent_buffers_set
    return saved or (is_unsaved_constant(owner, names[0]) and tracer.counts(groups))


def _filter(tracer: Tracer, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Pass channels through, filtered one by one, as antialiasing does."""
    x, weight, _ = _given(args, kwargs)
    rows = tracer.labels.axis(weight, 0)
    tracer.labels.atoms.join(rows, tracer.vector(tracer.label(x), 1 - out.ndim, x.shape[1]))
    note_site(tracer, rows)
    tracer.set(out, rows.view([1, -1] + [1] * (out.ndim - 2)))


@rule("conv_transpose2d")
def _conv_transpose(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    x, weight, bias = _operands(tracer, args, kwargs)
    groups = int(argument(args, kwargs, 6, "groups", default=1))
    if groups != 1:
        raise UntraceableError("a grouped transposed convolution")
    labels, atoms = tracer.labels, tracer.labels.atoms
    labels.out_dims[id(weight)] = 1
    columns = labels.axis(weight, 1)
    _join_bias(tracer, bias, columns)
    atoms.join(labels.axis(weight, 0), tracer.vector(tracer.label(x), 1, x.shape[1]))
    tracer.set(out, columns.view(1, -1, 1, 1))


def _operands(tracer: Tracer, args: Args, kwargs: Kwargs) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight, bias = _given(args, kwargs)
    if id(weight) not in tracer.parameters:
        raise UntraceableError("a weight that is no parameter")
    return x, weight, bias


def _given(args: Args, kwargs: Kwargs) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight, bias = (
        argument(args, kwargs, i, n) for i, n in enumerate(("input", "weight", "bias"))
    )
    return x, weight, bias


def _join_bias(tracer: Tracer, bias: Tensor | None, rows: Tensor) -> None:
    if bias is None:
        return
    if id(bias) in tracer.parameters:
        tracer.labels.atoms.join(tracer.labels.axis(bias, 0), rows)
    else:  # put together from several parameters, or a part of one
        atoms = tracer.vector(tracer.label(bias), 0, len(rows))
        tracer.labels.atoms.join(atoms, rows)
        tracer.labels.biases.update(zip(rows.tolist(), atoms.tolist(), strict=True))


@rule("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")
def _norm(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    x = argument(args, kwargs, 0, "input")
    statistics: list[Tensor | None] = []
    if name in ("batch_norm", "instance_norm"):
        statistics = [
            argument(args, kwargs, 1, "running_mean"),
            argument(args, kwargs, 2, "running_var"),
        ]
        weight, bias = (argument(args, kwargs, i, n) for i, n in ((3, "weight"), (4, "bias")))
        dim = 1
    else:
        weight, bias = (argument(args, kwargs, i, n) for i, n in ((2, "weight"), (3, "bias")))
        dim = 1 if name == "group_norm" else x.ndim - 1
    label = tracer.label(x)
    atoms = tracer.labels.atoms
    if name in ("layer_norm", "rms_norm"):
        shape = argument(args, kwargs, 1, "normalized_shape")
        if len(shape) > 1 and any(d >= x.ndim - len(shape) for d in tracer.varies(label)):
            raise UntraceableError("normalises over more than the channels")
        if len(shape) > 1:
            tracer.set(out, label)
            return
    if any(d != dim for d in tracer.varies(label)):
        if name == "batch_norm" or dim in tracer.varies(label) or name == "group_norm":
            raise UntraceableError("channels in several dimensions")
        for tensor in (weight, bias):
            if tensor is not None:
                tracer.labels.fix(tracer.labels.axis(tensor, 0), "normalises tokens")
        tracer.set(out, label)
        return
    incoming = tracer.vector(label, dim, x.shape[dim])
    if name == "group_norm":
        groups = int(argument(args, kwargs, 1, "num_groups"))
        atoms.join(incoming.view(groups, -1), incoming[: len(incoming) // groups].view(1, -1))
    outgoing = incoming
    for tensor in (*statistics, bias, weight):
        if tensor is None:
            continue
        if id(tensor) in tracer.parameters or id(tensor) in tracer.buffers:
            outgoing = tracer.labels.axis(tensor, 0)
            atoms.join(outgoing, incoming)
        else:
            atoms.join(tracer.vector(tracer.label(tensor), 0, len(incoming)), incoming)
    if name in ("layer_norm", "rms_norm", "group_norm"):
        note_site(tracer, incoming)
    shape = [1] * x.ndim
    shape[dim] = -1
    tracer.set(out, outgoing.contiguous().view(shape))


POINTWISE = words(
    """
    add radd iadd sub rsub isub mul rmul imul div rdiv truediv rtruediv itruediv true_divide
    divide multiply subtract pow rpow square sqrt rsqrt exp log abs neg negative sign clamp
    clamp_min clamp_max clip relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid tanh
    hardtanh hardsigmoid hardswish softplus threshold logsigmoid dropout dropout1d dropout2d
    dropout3d alpha_dropout feature_dropout float half double bfloat16 to type type_as
    contiguous clone detach where maximum minimum lerp addcmul nan_to_num masked_fill
    fill_mask sin cos erf round floor reciprocal positive prelu get_data requires_grad
    identity eq ne lt le gt ge logical_not tanhshrink hardshrink softshrink softsign rrelu
    bernoulli exp2 log1p expm1 xlogy
    """
)


@rule(*POINTWISE)
def pointwise(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Join what is combined entry by entry, by the rules of broadcasting."""
    inputs = [t for t in tensors_in((*args, *kwargs.values())) if t.ndim > 0]
    squares = [t for t in inputs if square_of(t) is not None]
    if squares:
        _scale_square(tracer, squares, inputs, out)
        return
    result = zeros(out.ndim)
    base: tuple[Tensor, tuple[int, ...]] | None = None
    for tensor in inputs:
        _note_own_parameter(tracer, tensor)
        if name == "prelu" and tensor is not inputs[0]:
            label, shape = tracer.label(tensor), (1, tensor.numel(), *[1] * (out.ndim - 2))
            label = label.reshape(shape)
        else:
            label, shape = tracer.label(tensor), tuple(tensor.shape)
        missing = out.ndim - len(shape)
        if missing < 0:
            raise UntraceableError("an input of more dimensions than the output")
        label, shape = label.view([1] * missing + list(label.shape)), (1,) * missing + shape
        base = (label, shape) if base is None else meet(tracer, base, (label, shape))
        result = base[0]
    _note_scale(tracer, name, args)
    tracer.set(out, result)


def _scale_square(
    tracer: Tracer, squares: Sequence[Tensor], inputs: Sequence[Tensor], out: Tensor
) -> None:
    """Scale a product of channels with channels, by the head: heads stay."""
    if len(squares) > 1 or any(t.shape[-2:].numel() > 1 for t in inputs if t is not squares[0]):
        raise UntraceableError("an outer product of channels")
    for tensor in inputs:
        if tensor is not squares[0]:
            tracer.labels.fix(tracer.label(tensor).reshape(-1), "scales a product of channels")
    atoms = square_of(squares[0])
    assert atoms is not None
    mark_square(out, atoms)


def _note_scale(tracer: Tracer, name: str, args: Args) -> None:
    """Note queries that the code divides by the root of their width, as it finds it.

    A number that the module keeps stays as it is; one that is computed follows the width.
    """
    if len(args) != 2 or not isinstance(args[0], Tensor) or type(args[1]) is not float:
        return
    x, factor = args
    if name not in ("mul", "imul", "div", "truediv") or x.ndim < 2:
        return
    if not math.isclose(factor, x.shape[-1] ** (-0.5 if name.endswith("mul") else 0.5)):
        return
    label = tracer.label(x)
    if tracer.varies(label) == [x.ndim - 1] and not tracer.keeps(factor):
        tracer.labels.scaled.append((tracer.owner, label.reshape(-1)))


def _note_own_parameter(tracer: Tracer, tensor: Tensor) -> None:
    """Count the channels of a vector that the running module keeps; its numbers may be as many."""
    mine = tracer.modules[tracer.owner].parameters(recurse=False)
    if tensor.ndim == 1 < tensor.numel() and any(tensor is parameter for parameter in mine):
        note_site(tracer, tracer.label(tensor))


def meet(
    tracer: Tracer,
    first: tuple[Tensor, tuple[int, ...]],
    second: tuple[Tensor, tuple[int, ...]],
) -> tuple[Tensor, tuple[int, ...]]:
    """Join the atoms of two tensors that are combined entry by entry, and label the result."""
    (a, a_shape), (b, b_shape) = first, second
    shape = tuple(max(m, n) for m, n in zip(a_shape, b_shape, strict=True))
    a_varies, b_varies = tracer.varies(a), tracer.varies(b)
    a_stretched = any(a_shape[d] == 1 < shape[d] for d in b_varies)
    b_stretched = any(b_shape[d] == 1 < shape[d] for d in a_varies)
    if b_stretched and not b_varies:
        tracer.labels.fix(b.reshape(-1), "a single channel that is spread over others")
        return a, shape
    if a_stretched and not a_varies:
        tracer.labels.fix(a.reshape(-1), "a single channel that is spread over others")
        return b, shape
    if a_stretched or b_stretched:
        raise UntraceableError("an outer product of channels")
    tracer.labels.atoms.join(a, b)
    return (b if b_varies and not a_varies else a), shape


def note_site(tracer: Tracer, atoms: Tensor) -> None:
    """Remember that the running module counts these channels."""
    tracer.labels.sites.append(Site(tracer.owner, len(atoms), atoms))
