"""Which functions apply a weight, at how many positions of one image, and what weighs channels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn


def channel_vectors(net: nn.Module) -> dict[int, Tensor]:
    """Return, by id, the buffers that weigh channels as parameters do: those of frozen norms.

    Such a norm keeps its weight, bias and statistics in buffers and computes with them itself
    (torchvision's FrozenBatchNorm2d, timm's FrozenBatchNormAct2d, those of detectors). It is told
    by having no parameter, no module and two saved vectors or more, all of one length. A single
    vector, such as a window, says nothing of channels.
    """
    found: dict[int, Tensor] = {}
    for module in net.modules():
        own = dict(module.named_buffers(recurse=False))
        saved = [b for name, b in own.items() if name not in module._non_persistent_buffers_set]
        vectors = [b for b in saved if b.is_floating_point() and 1 < b.numel() == max(b.shape)]
        plain = not module._parameters and not module._modules
        if plain and len(vectors) > 1 and len({b.numel() for b in vectors}) == 1:
            found.update({id(b): b for b in vectors})
    return found


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
