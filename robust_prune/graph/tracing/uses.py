"""Which functions apply a weight, and at how many positions of one image."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor


def argument(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    position: int,
    *names: str,
    default: Any = None,
) -> Any:
    """Return an argument given by position or by one of its names."""
    if len(args) > position:
        return args[position]
    return next((kwargs[name] for name in names if name in kwargs), default)


def weights_applied(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
) -> list[tuple[Tensor, int]]:
    """Return (weight, positions) for a call of a torch function on one image.

    A weight's multiply-adds are its entries times the positions; for a transposed convolution
    these are the positions of its input.
    """
    get = partial(argument, args, kwargs)
    if name == "multi_head_attention_forward":
        query, embed = get(0, "query"), get(3, "embed_dim_to_check")
        tokens = query.numel() // embed
        found = [(get(11, "out_proj_weight"), tokens)]
        if mixes_equal_tokens(query, get(1, "key"), get(2, "value")):
            found.append((get(5, "in_proj_weight"), tokens))
    elif name == "linear":
        found = [(get(1, "weight"), out.numel() // out.shape[-1])]
    elif name in ("conv1d", "conv2d", "conv3d"):
        found = [(get(1, "weight"), out.numel() // out.shape[-_map_dims(name) - 1])]
    elif name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
        x = get(0, "input")
        found = [(get(1, "weight"), x.numel() // x.shape[-_map_dims(name) - 1])]
    elif name in ("matmul", "mm", "rmatmul", "imatmul"):
        weight = get(0, "input") if name == "rmatmul" else get(1, "other", "mat2")
        found = [(weight, out.numel() // out.shape[-1] if out.ndim else 1)]
        found = [(w, n) for w, n in found if w.ndim == 2]  # of several matrices each meets its own
    elif name == "addmm":
        found = [(get(2, "mat2"), out.numel() // out.shape[-1])]
    else:
        return []
    return [(w, n) for w, n in found if isinstance(w, Tensor) and w.ndim > 1]


def mixes_equal_tokens(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether an attention's input projection meets as many queries as keys and values."""
    return query.shape[:-1] == key.shape[:-1] == value.shape[:-1]


def _map_dims(name: str) -> int:
    return int(name[-2])
