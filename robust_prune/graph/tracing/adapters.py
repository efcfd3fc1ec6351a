"""Modules that are traced by another forward than their own, and how to add more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.modules import NarrowAttention, heads_of, joined

Forward = Callable[..., Any]
_BY_CLASS: dict[type[nn.Module], Forward] = {}
_BY_NAME: dict[str, Forward] = {}


def adapter(*classes: type[nn.Module] | str) -> Callable[[Forward], Forward]:
    """Register a forward to trace modules of these classes with, instead of their own.

    Use it for a module whose forward the tracer can't follow: a custom kernel, a weight that is
    computed from others. The function gets the module and its inputs, and must return tensors of
    the right shape that couple channels as the module does, by plain torch functions on the
    module's own parameters; its values don't matter.

    Inner units follow from what it calls: `view(..., heads, width)` makes the same dims of every
    head one unit, a product or `scaled_dot_product_attention` couples queries with keys. Called
    without `scale`, the latter says that the module divides by the root of its heads' width, and
    pruning makes up for it. Numbers of the module that equal a size the function splits or merges
    channels by (`module.head_dim`) follow the pruned width.

    Classes may be given by name (`package.Class`), so that their package need not be imported;
    subclasses are included. A wrong adapter costs groups, as every group is tried on a copy.

        @adapter(MyAttention)
        def trace(module, x):
            q, k, v = module.qkv(x).unflatten(-1, (3, module.heads, module.width)).unbind(-3)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v)
            return module.out(out.transpose(1, 2).flatten(2))
    """

    def register(function: Forward) -> Forward:
        for cls in classes:
            if isinstance(cls, str):
                _BY_NAME[cls] = function
            else:
                _BY_CLASS[cls] = function
        return function

    return register


def find(module: nn.Module) -> Forward | None:
    """Return the forward to trace a module with, or None for its own."""
    for cls in type(module).__mro__:
        package = cls.__module__.partition(".")[0]
        found = _BY_CLASS.get(cls) or _BY_NAME.get(f"{package}.{cls.__name__}")
        if found is not None:
            return found
    return None


@contextlib.contextmanager
def adapted(net: nn.Module) -> Iterator[None]:
    """Let the modules that have an adapter run by it."""
    changed = []
    try:
        for module in net.modules():
            function = find(module)
            if function is not None and "forward" not in module.__dict__:
                module.forward = function.__get__(module)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


@adapter("timm.StdConv2d", "timm.StdConv2dSame", "timm.ScaledStdConv2d", "timm.ScaledStdConv2dSame")
def _standardised_convolution(module: Any, x: Tensor) -> Tensor:
    """Weight-standardised convolutions: rows are normalised, a gain per row may follow."""
    if getattr(module, "same_pad", False):
        down, right = (
            max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
            for size, kernel, stride, dilation in zip(
                x.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True
            )
        )
        x = F.pad(x, [0, right, 0, down])
    x = nn.Conv2d.forward(module, x)
    gain = getattr(module, "gain", None)
    return x if gain is None else x * gain.view(1, -1, 1, 1)


@adapter("timm.GlobalResponseNorm")
def _global_response_norm(module: Any, x: Tensor) -> Tensor:
    """Divides by the mean over channels: a norm like any other."""
    if module.channel_dim == 1:
        return F.group_norm(x, 1, module.weight, module.bias)
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias)


@adapter("timm.RmsNorm2d", "timm.SimpleNorm2d")
def _norm_of_maps(module: Any, x: Tensor) -> Tensor:
    """Norms over the channels of maps, put together from means: like one group of a group norm."""
    x = F.group_norm(x, 1, module.weight)
    return module.act(x) if hasattr(module, "act") else x


@adapter("timm.SimpleNorm")
def _simple_norm(module: Any, x: Tensor) -> Tensor:
    """A norm without mean, put together from a variance."""
    return F.layer_norm(x, x.shape[-1:], module.weight)


@adapter(nn.MultiheadAttention)
def _multi_head_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """torch's attention is one function, which hides its heads; it has one width for all three."""
    if type(module) not in (nn.MultiheadAttention, NarrowAttention):  # whose forward is its own
        out: tuple[Tensor, Tensor | None] = type(module).forward(
            module, query, key, value, *args, **kwargs
        )
        return out
    q, k, v = heads_of(module, query, key, value)
    q = q + v.mean(-2, keepdim=True)
    asked = {**dict(zip(NEXT, args, strict=False)), **kwargs}
    weights = None
    if asked.get("need_weights", True):
        heads = () if asked.get("average_attn_weights", True) else (module.num_heads,)
        weights = query.new_zeros(len(q), *heads, q.shape[-2], k.shape[-2])
        weights = weights if query.ndim == 3 else weights[0]
    return joined(module, F.scaled_dot_product_attention(q, k, v), query), weights


NEXT = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
