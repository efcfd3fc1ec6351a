"""What products, reductions and pools do to channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robust_prune.graph.tracing.atoms import zeros
from robust_prune.graph.tracing.rules import Args, Kwargs, meet, note_site, pointwise, rule, words
from robust_prune.graph.tracing.tracer import (
    Tracer,
    UntraceableError,
    mark_square,
    square_of,
)
from robust_prune.graph.tracing.uses import argument
from robust_prune.modules import tensors_in


@rule("matmul", "rmatmul", "bmm", "mm", "imatmul")
def _matmul(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    first = argument(args, kwargs, 0, "input")
    second = argument(args, kwargs, 1, "other", "mat2")
    if name == "rmatmul":
        first, second = second, first
    if id(second) in tracer.parameters and second.ndim == 2:
        labels, atoms = tracer.labels, tracer.labels.atoms
        labels.out_dims[id(second)] = 1
        atoms.join(labels.axis(second, 0), tracer.vector(tracer.label(first), -1, first.shape[-1]))
        tracer.set(out, labels.axis(second, 1).view([1] * (out.ndim - 1) + [-1]))
        return
    if min(first.ndim, second.ndim) < 2:
        raise UntraceableError("a product of vectors")
    _contract(tracer, first, second, out)


@rule("baddbmm", "addmm", "addbmm")
def _addmm(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    if tracer.varies(tracer.label(args[0])):
        raise UntraceableError("a sum of labelled products")
    _matmul(tracer, "matmul", args[1:], {}, out)


def _contract(tracer: Tracer, first: Tensor, second: Tensor, out: Tensor) -> None:
    """Label [..., m, n] = [..., m, k] x [..., k, n]; both lose the same k, one of m, n passes.

    Or both lose the same batches, which are an attention's heads.
    """
    square = square_of(first)
    if square is not None:  # of channels with channels; the rows pass
        tracer.labels.atoms.join(square, tracer.vector(tracer.label(second), -2, len(square)))
        tracer.set(out, square.view([1] * (out.ndim - 2) + [-1, 1]))
        return
    ndim = out.ndim
    a, b = (
        tracer.label(t).view([1] * (ndim - t.ndim) + list(tracer.label(t).shape))
        for t in (first, second)
    )
    _keep_mixed_heads(tracer, a, b)
    a_varies = [d - ndim for d in tracer.varies(a)]
    b_varies = [d - ndim for d in tracer.varies(b)]
    if (a_varies or b_varies) and all(d < -2 for d in (*a_varies, *b_varies)):
        a_shape, b_shape = ((*[1] * (ndim - t.ndim), *t.shape[:-2], 1, 1) for t in (first, second))
        a, b = (label.narrow(-1, 0, 1).narrow(-2, 0, 1) for label in (a, b))
        tracer.set(out, meet(tracer, (a, a_shape), (b, b_shape))[0])
        return
    if any(d < -2 for d in (*a_varies, *b_varies)) or max(len(a_varies), len(b_varies)) > 1:
        raise UntraceableError("channels in several dimensions")
    if -1 in a_varies or -2 in b_varies:
        tracer.labels.atoms.join(a.transpose(-1, -2), b)
        tracer.labels.gates.append(a.reshape(-1))
    label = zeros(ndim)
    passing = (-2 in a_varies) + (-1 in b_varies)
    if passing == 2:
        rows, columns = tracer.vector(a, -2, out.shape[-2]), tracer.vector(b, -1, out.shape[-1])
        if not torch.equal(*(tracer.labels.atoms.find(v.contiguous()) for v in (rows, columns))):
            raise UntraceableError("an outer product of channels")
        mark_square(out, rows.contiguous())
        return
    if -2 in a_varies:
        label = a
    elif -1 in b_varies:
        label = b
    tracer.set(out, label)


def _keep_mixed_heads(tracer: Tracer, first: Tensor, second: Tensor) -> None:
    """Make the heads of one factor stay where the other factor's channels lie inside heads.

    A layer that mixes the heads of an attention map has channels of its own, which are heads.
    """
    for heads, inner in ((first, second), (second, first)):
        outside, inside = tracer.varies(heads), tracer.varies(inner)
        if outside and inside and max(outside) < heads.ndim - 2 <= min(inside):
            tracer.labels.fix(heads.reshape(-1), "its channels are heads, whose dims are pruned")


@rule("scaled_dot_product_attention")
def _attention(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    query, key, value = (
        argument(args, kwargs, i, n) for i, n in enumerate(("query", "key", "value"))
    )
    q, k, v = tracer.label(query), tracer.label(key), tracer.label(value)
    last = query.ndim - 1
    varies = {d for label in (q, k, v) for d in tracer.varies(label)}
    if varies and max(varies) < last - 1:  # heads go whole
        shape = (*query.shape[:-2], 1, 1)
        q, k, v = (label.narrow(-1, 0, 1).narrow(-2, 0, 1) for label in (q, k, v))
        both = meet(tracer, (q, shape), (k, (*key.shape[:-2], 1, 1)))
        tracer.set(out, meet(tracer, both, (v, (*value.shape[:-2], 1, 1)))[0])
        return
    if varies - {last}:
        raise UntraceableError("channels in several dimensions")
    tracer.labels.atoms.join(
        tracer.vector(q, -1, query.shape[-1]), tracer.vector(k, -1, key.shape[-1])
    )
    tracer.labels.gates.append(q.reshape(-1))
    if argument(args, kwargs, 6, "scale") is None:
        tracer.labels.scaled.append((tracer.owner, q.reshape(-1)))
    tracer.set(out, v)


@rule("einsum")
def _einsum(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    equation = args[0].replace(" ", "")
    operands = tensors_in(args[1:])
    if "." in equation or "->" not in equation:
        raise UntraceableError("an einsum with an ellipsis")
    inputs, result = equation.split("->")
    channels: dict[str, Tensor] = {}
    for letters, tensor in zip(inputs.split(","), operands, strict=True):
        label = tracer.label(tensor)
        varies = tracer.varies(label)
        if len(varies) > 1:
            raise UntraceableError("channels in several dimensions")
        for dim, letter in enumerate(letters):
            vector = tracer.vector(label, dim, tensor.shape[dim]) if dim in varies else None
            if vector is None:
                vector = torch.zeros(tensor.shape[dim], dtype=torch.long)
            if letter in channels:
                tracer.labels.atoms.join(channels[letter], vector)
            else:
                channels[letter] = vector
    label = zeros(out.ndim)
    found = [d for d, letter in enumerate(result) if tracer.varies(channels[letter])]
    if len(found) > 1:
        raise UntraceableError("an outer product of channels")
    for dim in found:
        shape = [1] * out.ndim
        shape[dim] = -1
        label = channels[result[dim]].contiguous().view(shape)
    tracer.set(out, label)


@rule("softmax", "log_softmax", "cumsum", "softmin", "gumbel_softmax")
def _along(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    dim = argument(args, kwargs, 1, "dim", default=-1)
    square = square_of(args[0])
    if square is not None and name == "softmax" and dim % out.ndim == out.ndim - 1:
        note_site(tracer, square)
        tracer.labels.softmaxes.add(tracer.owner)
        mark_square(out, square)
        return
    label = tracer.label(args[0])
    if dim % out.ndim in tracer.varies(label):
        raise UntraceableError(f"{name} over channels")
    tracer.set(out, label)


@rule("normalize")
def _normalize(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    tracer.set(out, tracer.label(args[0]))  # a channel of zeros changes no norm


@rule(
    *words(
        """
    mean sum amax amin max min prod norm var std logsumexp argmax var_mean any all
    """
    )
)
def _reduce(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    x = args[0]
    dims = argument(args, kwargs, 1, "dim", "axis")
    if isinstance(dims, Tensor):
        pointwise(tracer, name, args, kwargs, out)
        return
    label = tracer.label(x)
    ndim = x.ndim
    if dims is None:
        dims = tuple(range(ndim))
    dims = sorted({d % ndim for d in (dims if isinstance(dims, (tuple, list)) else (dims,))})
    varying = [d for d in tracer.varies(label) if d in dims]
    if varying and (name != "sum" or len(tracer.varies(label)) > 1):
        raise UntraceableError(f"{name} over channels")
    label = zeros(ndim) if varying else label
    for dim in dims:
        label = label.narrow(dim, 0, 1)
    outputs = tensors_in((out,))
    if outputs[0].ndim < ndim:
        label = label.reshape([s for d, s in enumerate(label.shape) if d not in dims])
    for tensor in outputs:
        tracer.set(tensor, label)


@rule(
    *words(
        """
    adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d max_pool2d max_pool2d_with_indices
    boolean_dispatch fn interpolate upsample avg_pool1d max_pool1d adaptive_avg_pool1d
    lp_pool2d grid_sample upsample_bilinear upsample_nearest
    """
    )
)
def _spatial(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    x = args[0] if args else kwargs["input"]
    label = tracer.label(x)
    outputs = tensors_in((out,))
    spatial = 1 if "1d" in name else 2
    if any(d >= x.ndim - spatial for d in tracer.varies(label)):
        raise UntraceableError("channels in a spatial dimension")
    for dim in range(x.ndim - spatial, x.ndim):
        label = label.narrow(dim, 0, 1)
    for tensor in outputs:
        tracer.set(tensor, label)


@rule("unfold")
def _unfold(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    x = args[0]
    label = tracer.label(x)
    if isinstance(argument(args, kwargs, 1, "kernel_size", "dimension"), int) and out.ndim != 3:
        dim = args[1] % x.ndim  # Tensor.unfold: windows along one dimension
        if dim in tracer.varies(label):
            raise UntraceableError("windows over channels")
        tracer.set(out, label.narrow(dim, 0, 1).unsqueeze(-1))
        return
    vector = tracer.vector(label, 1, x.shape[1])
    tracer.set(out, vector.repeat_interleave(out.shape[1] // x.shape[1]).view(1, -1, 1))


@rule("fold")
def _fold(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    x = args[0]
    vector = tracer.vector(tracer.label(x), 1, x.shape[1]).reshape(out.shape[1], -1)
    tracer.labels.atoms.join(vector, vector[:, :1])
    tracer.set(out, vector[:, 0].contiguous().view(1, -1, 1, 1))


@rule(
    *words(
        """
    zeros_like ones_like rand_like randn_like empty_like full_like new_zeros new_ones
    new_full new_empty new_tensor zeros ones arange full linspace empty rand randn tensor
    meshgrid eye get_dtype outer get_is_leaf get_grad zero
    """
    )
)
def _fresh(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    for tensor in tensors_in((out,)):
        tracer.set(tensor, zeros(tensor.ndim))
