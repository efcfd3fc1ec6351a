"""What functions that move data do to channels: they move the atoms along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robust_prune.graph.tracing.atoms import compress
from robust_prune.graph.tracing.rules import Args, Kwargs, full, meet, note_site, rule, words
from robust_prune.graph.tracing.tracer import Tracer, UntraceableError, mark_piece
from robust_prune.graph.tracing.uses import argument
from robust_prune.modules import is_unsaved_constant, tensors_in

VIEWS = words(
    """
    permute transpose swapaxes swapdims movedim moveaxis t squeeze unsqueeze expand
    expand_as select narrow unbind get_T get_mT broadcast_to
    """
)


@rule(
    *VIEWS,
    *words(
        """
    getitem flip roll rot90 index_select repeat tile repeat_interleave adjoint
    take_along_dim get_H get_mH
    """
    ),
)
def _move(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    if name in ("roll", "index_select", "take_along_dim", "getitem", "narrow", "select"):
        _keep_order(tracer, name, args, kwargs)
    moved = _apply(tracer, name, args, kwargs)
    for tensor, label in zip(tensors_in((out,)), tensors_in((moved,)), strict=True):
        tracer.set(tensor, compress(label, by_value=name not in VIEWS))
        if name in ("getitem", "narrow"):
            _note_sites(tracer, tracer.label(tensor), tensor.shape)
    if name == "expand_as":
        meet(tracer, (tracer.label(out), out.shape), (tracer.label(args[1]), args[1].shape))
    if name == "unbind":
        _whole_pieces(tracer, tensors_in((out,)))


@rule("cat", "concat", "concatenate", "stack")
def _concatenate(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    pieces = argument(args, kwargs, 0, "tensors")
    dim = argument(args, kwargs, 1, "dim", "axis", default=0) % out.ndim
    if name == "stack":
        labels = [tracer.label(piece).unsqueeze(dim) for piece in pieces]
        sizes = [1] * len(labels)
    else:
        labels = [_label_beside(tracer, piece, pieces) for piece in pieces]
        sizes = [piece.shape[dim] for piece in pieces]
    for label in labels:
        _join_rows(tracer, label, dim)
    varies = [tracer.varies(label) for label in labels]
    across = {d for v in varies for d in v if d != dim}
    if across and any(dim in v for v in varies):
        raise UntraceableError("channels in several dimensions")
    if across:  # the pieces must stay equally wide
        for label in labels[1:]:
            tracer.labels.atoms.join(label.narrow(dim, 0, 1), labels[0].narrow(dim, 0, 1))
        widest = max(labels, key=torch.Tensor.numel)
        tracer.set(out, widest.narrow(dim, 0, 1))
        return
    whole = []
    for label, size in zip(labels, sizes, strict=True):
        for other in range(out.ndim):
            label = label.narrow(other, 0, 1) if other != dim else label
        shape = [1] * out.ndim
        shape[dim] = size
        whole.append(label.expand(shape))
    tracer.set(out, compress(torch.cat(whole, dim), by_value=True))


def _join_rows(tracer: Tracer, label: Tensor, dim: int) -> None:
    """Give each row of a bare parameter, such as learned tokens, the same channels."""
    varies = tracer.varies(label)
    if len(varies) == 2 and dim in varies and len(torch.unique(label)) == label.numel():
        tracer.labels.atoms.join(label, label.narrow(dim, 0, 1))


def _label_beside(tracer: Tracer, piece: Tensor, pieces: Sequence[Tensor]) -> Tensor:
    """Return the atoms of a piece; a constant vector between parameters has some of its own.

    That is the bias of keys, which is zero and not learned, between those of queries and values.
    """
    learned = [other.shape for other in pieces if tracer.is_parameter(other)]
    if piece.ndim == 1 and piece.shape in learned and id(piece) in tracer.buffers:
        owner = tracer.modules[tracer.owner]
        names = [name for name, buffer in owner.named_buffers(recurse=False) if buffer is piece]
        if names and is_unsaved_constant(owner, names[0]):
            return tracer.entries(piece)
    return tracer.label(piece)


def _keep_order(tracer: Tracer, name: str, args: Args, kwargs: Kwargs) -> None:
    """Refuse positions of single channels that are part of the code: fewer have others.

    A part of the channels may be taken where the running module keeps the number of channels up
    to which, or from which, it is taken.
    """
    x = args[0]
    varies = tracer.varies(tracer.label(x))
    if not varies:
        return
    if name == "roll":
        dims = argument(args, kwargs, 2, "dims", default=tuple(range(x.ndim)))
        chosen = [d % x.ndim for d in (dims if isinstance(dims, (tuple, list)) else (dims,))]
    elif name == "getitem":
        chosen = _chosen(tracer, x, args[1] if isinstance(args[1], tuple) else (args[1],))
    elif name == "narrow":
        dim, start, length = (
            argument(args, kwargs, i, n) for i, n in enumerate(("dim", "start", "length"), 1)
        )
        chosen = _chosen(
            tracer, x, (slice(None),) * (dim % x.ndim) + (slice(start, start + length),)
        )
    else:
        position = 2 if name == "take_along_dim" else 1
        chosen = [argument(args, kwargs, position, "dim", default=0) % x.ndim]
    if set(chosen) & set(varies):
        raise UntraceableError("channels chosen by their positions")


def _chosen(tracer: Tracer, x: Tensor, index: tuple[Any, ...]) -> list[int]:
    """Return the dimensions of which an index takes a part by numbers of the code."""
    taken = [item for item in index if item is not None]
    rest = x.ndim - len(taken) + sum(item is Ellipsis for item in taken)
    chosen, dim = [], 0
    for item in taken:
        if item is Ellipsis:
            dim += rest
            continue
        if isinstance(item, slice):
            start, stop, step = item.indices(x.shape[dim])
            part = (start, stop, step) != (0, x.shape[dim], 1)
            part = part and not _is_share(tracer, x, start, stop, step)
            ends = [n for n in (start, stop) if n not in (0, x.shape[dim])]
            if part and (step != 1 or not all(tracer.counts(n) for n in ends)):
                chosen.append(dim)
        else:
            chosen.append(dim)
        dim += item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else 1
    return chosen


def _is_share(tracer: Tracer, x: Tensor, start: int, stop: int, step: int) -> bool:
    """Join the equal shares of a vector of which one is taken, as that of keys from a bias.

    Its ends are taken for numbers that the code computes from the length.
    """
    size = stop - start
    if x.ndim > 1 or step != 1 or size < 2 or start % size or len(x) % size:
        return False
    shares = full(tracer, x).reshape(-1, size)
    tracer.labels.atoms.join(shares, shares[:1])
    return True


@rule("pixel_shuffle")
def _to_pixels(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    vector = tracer.vector(tracer.label(args[0]), -3, args[0].shape[-3])
    blocks = vector.contiguous().view(out.shape[-3], -1)
    tracer.labels.atoms.join(blocks, blocks[:, :1])
    tracer.set(out, blocks[:, 0].reshape([1] * (out.ndim - 3) + [-1, 1, 1]))


@rule("pixel_unshuffle")
def _from_pixels(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    size = args[0].shape[-3]
    vector = tracer.vector(tracer.label(args[0]), -3, size)
    spread = vector.repeat_interleave(out.shape[-3] // size)
    tracer.set(out, spread.view([1] * (out.ndim - 3) + [-1, 1, 1]))


@rule("channel_shuffle", "native_channel_shuffle")
def _shuffle(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    vector = tracer.vector(tracer.label(args[0]), 1, out.shape[1])
    parts = vector.contiguous().view(int(argument(args, kwargs, 1, "groups")), -1)
    tracer.labels.atoms.join(parts, parts[:1])
    tracer.set(out, parts.T.reshape([1, -1] + [1] * (out.ndim - 2)))


def _apply(tracer: Tracer, name: str, args: Args, kwargs: Kwargs) -> Any:
    """Do to the atoms what the function does to the data."""
    swap = _swapper(tracer)
    if name.startswith("get_"):
        return getattr(swap(args[0]), name.removeprefix("get_"))
    if name == "getitem":
        index = args[1]
        return swap(args[0])[index]
    arguments = tuple(swap(a) if i == 0 else a for i, a in enumerate(args))
    options = {k: swap(v) if k in ("input", "tensors") else v for k, v in kwargs.items()}
    if isinstance(arguments[0] if arguments else None, Tensor) and hasattr(Tensor, name):
        return getattr(arguments[0], name)(*arguments[1:], **options)
    return getattr(torch, name)(*arguments, **options)


def _swapper(tracer: Tracer) -> Callable[[Any], Any]:
    def swap(value: Any) -> Any:
        if isinstance(value, Tensor):
            return full(tracer, value)
        if isinstance(value, (list, tuple)):
            return type(value)(swap(v) for v in value)
        return value

    return swap


def _whole_pieces(tracer: Tracer, pieces: Sequence[Tensor]) -> None:
    """Fix channels that a function takes one by one: their number is part of the code."""
    for piece in pieces:
        label = tracer.canonical(tracer.label(piece))
        if label.numel() == 1 and piece.numel() > 1:
            tracer.labels.fix(label.reshape(-1), "is taken apart into single channels")


@rule("chunk", "split", "tensor_split", "split_with_sizes")
def _pieces(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    dim = argument(args, kwargs, 2, "dim", default=0)
    of_weight = tracer.is_parameter(args[0]) and args[0].ndim == 2 and dim == 0
    if name == "chunk" and of_weight and len({len(piece) for piece in out}) == 1:
        for i, piece in enumerate(out):
            mark_piece(piece, args[0], i * len(piece))
        return
    label = full(tracer, args[0])
    parts = torch.split(label, [piece.shape[dim] for piece in out], dim)
    parts = tuple(compress(part) for part in parts)
    sizes = {piece.shape[dim] for piece in out}
    if dim % label.ndim in tracer.varies(tracer.label(args[0])):
        if len(sizes) > 1 and not all(size == 1 or tracer.counts(size) for size in sizes):
            raise UntraceableError("channels chosen by their positions")
        if len(sizes) == 1:
            for part in parts[1:]:
                tracer.labels.atoms.join(part, parts[0])
        for piece, part in zip(out, parts, strict=True):
            _note_sites(tracer, part, piece.shape)
    for piece, part in zip(out, parts, strict=True):
        tracer.set(piece, part)


@rule("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel")
def _reshape(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    x = args[0]
    label = full(tracer, x).reshape(out.shape)
    label = compress(label, by_value=True)
    for before, after in _blocks(x.shape, out.shape):
        split = [d for d in after if out.shape[d] > 1]
        if len(split) > 1 and any(d in tracer.varies(tracer.label(x)) for d in before):
            label = _keep_rectangular(tracer, label, split, out.shape)
    if name in ("view_as", "reshape_as"):
        other = argument(args, kwargs, 1, "other")
        meet(tracer, (label, out.shape), (tracer.label(other), other.shape))
    _note_sites(tracer, label, out.shape)
    tracer.set(out, label)


def _keep_rectangular(
    tracer: Tracer, label: Tensor, dims: Sequence[int], shape: Sequence[int]
) -> Tensor:
    """Join channels so that a dimension split into several stays a box.

    The last factor shrinks, or, where heads are units, the one that is their number.
    """
    varying = [d for d in tracer.varies(label) if d in dims]
    # three heads look like queries, keys and values, which come first
    shrinks = next((d for d in reversed(varying[:-1]) if shape[d] == tracer.heads), None)
    for dim in varying[:-1] if shrinks is None else [d for d in varying if d != shrinks]:
        tracer.labels.atoms.join(label, label.narrow(dim, 0, 1))
    return label


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return which dimensions of a shape became which of another, in the smallest steps."""
    found, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        left, right = [i] if i < len(before) else [], [j] if j < len(after) else []
        m = before[i] if left else 1
        n = after[j] if right else 1
        i, j = i + len(left), j + len(right)
        while m != n:
            if m < n:
                m, left = m * before[i], [*left, i]
                i += 1
            else:
                n, right = n * after[j], [*right, j]
                j += 1
        found.append((left, right))
    return found


def _note_sites(tracer: Tracer, label: Tensor, shape: Sequence[int]) -> None:
    for dim in tracer.varies(label):
        part = label
        for other in range(label.ndim):
            if other != dim:
                part = part.narrow(other, 0, 1)
        note_site(tracer, part.reshape(-1).expand(shape[dim]))


@rule("pad")
def _pad(tracer: Tracer, name: str, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    x, padding = args[0], argument(args, kwargs, 1, "pad")
    label = tracer.label(x)
    for pair in range(len(padding) // 2):
        dim = x.ndim - 1 - pair
        before, after = padding[2 * pair : 2 * pair + 2]
        if (before or after) and dim in tracer.varies(label):
            sizes = list(label.shape)
            parts = []
            for size in (before, after):
                sizes[dim] = max(int(size), 0)
                parts.append(torch.zeros(sizes, dtype=torch.long))
            label = torch.cat([parts[0], label, parts[1]], dim)
            if min(before, after) < 0:
                raise UntraceableError("cropped channels")
    tracer.set(out, label)
