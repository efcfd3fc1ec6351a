"""Products between activations, and recurrent cells: the work that no layer's weight stands for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from robust_prune.graph.tracing.uses import argument, mixes_equal_tokens, weights_applied
from robust_prune.modules import tensors_in

Place = tuple[Tensor, int]
Size = tuple[int, tuple[Place, ...]]
Product = tuple[Size, ...]
Get = Callable[..., Any]

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def work_of(
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    out: Any,
    is_parameter: Callable[[Tensor], bool],
) -> tuple[list[tuple[Tensor, int]], list[Product]]:
    """Return (weight, positions), and the products beyond these, for a call on one image.

    A product takes as many multiply-adds as its sizes multiplied. A size names the tensors and
    dimensions that it is the size of, where those can lose channels.

    Args:
        name: of the torch function, bare.
        args: of the call.
        kwargs: of the call.
        out: what it returned.
        is_parameter: whether a tensor is a parameter of the network.
    """
    weights = [(w, n) for w, n in weights_applied(name, args, kwargs, out) if is_parameter(w)]
    if weights and name != "multi_head_attention_forward":
        return weights, []
    return weights, _products(name, args, kwargs, out)


def _products(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
) -> list[Product]:
    get = partial(argument, args, kwargs)
    if name in ("matmul", "mm", "bmm", "imatmul", "mv", "dot", "vdot"):
        return [_matmul(get(0, "input"), get(1, "other", "mat2", "vec", "tensor"), out)]
    if name == "rmatmul":
        return [_matmul(args[1], args[0], out)]
    if name in ("addmm", "baddbmm", "addmv"):
        names = ("mat1", "batch1", "mat"), ("mat2", "batch2", "vec")
        return [_matmul(get(1, *names[0]), get(2, *names[1]), out)]
    if name == "addbmm":
        return [_batched_sum(get(1, "batch1"), get(2, "batch2"))]
    if name == "inner":
        return [_inner(get(0, "input"), get(1, "other"))]
    if name == "tensordot":
        return [_tensordot(get(0, "a"), get(1, "b"), out)]
    if name == "einsum":
        return _einsum(args)
    if name == "linear":
        x, weight = get(0, "input"), get(1, "weight")
        return [_linear(x, out) if weight.ndim > 1 else _matmul(x, weight, out)]
    if name.startswith("conv") and name[-1:] == "d" and name[-2:-1].isdigit():
        return [_convolution(name, get(0, "input"), get(1, "weight"), out)]
    if name == "bilinear":
        return [_fixed(out.numel(), get(2, "weight").shape[1:].numel())]
    if name == "scaled_dot_product_attention":
        return _attention(get(0, "query"), get(1, "key"), get(2, "value"))
    if name == "multi_head_attention_forward":
        return _multi_head_attention(get)
    if name.removesuffix("_cell") in CELLS:
        return _recurrent(name, args)
    return []


def _matmul(first: Tensor, second: Tensor, out: Tensor) -> Product:
    """[..., m, k] x [..., k, n], or vectors in the place of either."""
    rows = [_size(first, -2)] if first.ndim > 1 else []
    columns = [_size(second, -1)] if second.ndim > 1 else []
    batch = out.ndim - len(rows) - len(columns)
    sizes = []
    for dim in range(batch):
        size = out.shape[dim]
        back = dim - batch - 2
        places = tuple(
            (t, t.ndim + back) for t in (first, second) if t.ndim + back >= 0 and t.shape[back] > 1
        )
        sizes.append((size, places))
    contracted = _size(second, -2 if second.ndim > 1 else -1)
    inner = contracted[0], ((first, first.ndim - 1), *contracted[1])
    return (*sizes, *rows, *columns, inner)


def _batched_sum(first: Tensor, second: Tensor) -> Product:
    """[b, m, k] x [b, k, n], summed over b."""
    return (_size(first, 0), _size(first, 1), _size(first, 2), _size(second, 2))


def _inner(first: Tensor, second: Tensor) -> Product:
    """All rows of the one with all rows of the other, along their last dimensions."""
    sizes = [_size(first, dim) for dim in range(first.ndim)]
    return (*sizes, *(_size(second, dim) for dim in range(second.ndim - 1)))


def _tensordot(first: Tensor, second: Tensor, out: Tensor) -> Product:
    """Every entry of the result is a sum over the dimensions that both lose."""
    both = first.numel() * second.numel() // max(out.numel(), 1)
    return _fixed(out.numel(), math.isqrt(both))


def _linear(x: Tensor, out: Tensor) -> Product:
    return (*(_size(x, dim) for dim in range(x.ndim)), _size(out, -1))


def _convolution(name: str, x: Tensor, weight: Tensor, out: Tensor) -> Product:
    """By a kernel that is no parameter: fixed, or computed from parameters."""
    maps = int(name[-2])
    whole = out if "transpose" not in name else x  # what its positions are those of
    positions = whole.shape[-maps:].numel() * (whole.shape[0] if whole.ndim > maps + 1 else 1)
    outer, inner = (_size(t, -maps - 1) for t in (out, x))
    if "transpose" in name:
        outer, inner = inner, outer
    if weight.shape[1] != inner[0]:  # in groups
        inner = weight.shape[1], ()
    return (*_fixed(positions, weight.shape[2:].numel()), outer, inner)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> list[Product]:
    """Queries [..., L, E] with keys [..., S, E], and the weights with values [..., S, V]."""
    common = (*(_size(query, dim) for dim in range(query.ndim - 1)), _size(key, -2))
    return [(*common, _size(query, -1)), (*common, _size(value, -1))]


def _multi_head_attention(get: Get) -> list[Product]:
    """torch's own function, [L, (N,) E]; its heads together are as wide as its embedding."""
    query, key, value = (get(i, n) for i, n in enumerate(("query", "key", "value")))
    embed = get(3, "embed_dim_to_check")
    images = query.shape[1] if query.ndim == 3 else 1
    length = query.shape[0]
    keys = key.shape[0] + (get(7, "bias_k") is not None) + bool(get(9, "add_zero_attn"))
    found = [_fixed(images, length, keys, embed)] * 2
    tokens = length * images, key.shape[0] * images, value.shape[0] * images
    if get(17, "use_separate_proj_weight", default=False):
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights = [get(18 + i, n) for i, n in enumerate(names)]
        found += [_fixed(w.numel(), n) for w, n in zip(weights, tokens, strict=True)]
    elif not mixes_equal_tokens(query, key, value):
        found.append(_fixed(embed, embed, sum(tokens)))
    return found


def _recurrent(name: str, args: tuple[Any, ...]) -> list[Product]:
    """Every matrix of every layer and direction is applied once for each step."""
    if name.endswith("_cell"):
        weights = args[2:4]
    else:  # states and, for packed sequences, batch sizes come before the flat weights
        weights = tuple([a for a in args if isinstance(a, (list, tuple)) and tensors_in(a)][-1])
    steps = args[0].numel() // args[0].shape[-1]
    return [_fixed(steps, w.numel()) for w in weights if w.ndim > 1]


def _einsum(args: tuple[Any, ...]) -> list[Product]:
    """One product for each operand but the first, from left to right.

    What only one of two operands has, and nothing later needs, is summed before they meet.
    """
    if not isinstance(args[0], str):
        return []
    operands = tensors_in(args[1:])
    inputs, result = _letters(args[0].replace(" ", ""), operands)
    sizes: dict[str, Size] = {}
    for letters, tensor in zip(inputs, operands, strict=True):
        for dim, letter in enumerate(letters):
            size, places = _size(tensor, dim)
            known, before = sizes.get(letter, (1, ()))
            sizes[letter] = max(size, known), (*before, *(places if size > 1 else ()))
    found = []
    left = set(inputs[0])
    for i, right in enumerate(map(set, inputs[1:]), start=1):
        needed = set(result).union(*inputs[i + 1 :])
        meeting = {letter for letter in left | right if letter in needed or letter in left & right}
        found.append(tuple(sizes[letter] for letter in sorted(meeting)))
        left = meeting & needed
    return found


def _letters(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str]:
    """Return the letters of each operand and of the result; an ellipsis is digits from the right.

    Without an arrow the result has the letters that occur once, in order.
    """
    left, arrow, result = equation.partition("->")
    inputs = []
    widest = 0
    for letters, tensor in zip(left.split(","), operands, strict=True):
        more = tensor.ndim - len(letters.replace("...", "")) if "..." in letters else 0
        widest = max(widest, more)
        inputs.append(letters.replace("...", _digits(more)))
    if not arrow:
        once = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        result = ("..." if widest else "") + "".join(once)
    return inputs, result.replace("...", _digits(widest))


def _digits(count: int) -> str:
    return "".join(str(i) for i in reversed(range(count)))


def _size(tensor: Tensor, dim: int) -> Size:
    dim %= max(tensor.ndim, 1)
    return int(tensor.shape[dim]), ((tensor, dim),)


def _fixed(*sizes: int) -> Product:
    return tuple((int(size), ()) for size in sizes)
