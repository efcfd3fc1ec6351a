"""torch's multi-head attention, also where its heads together are narrower than its embedding."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.errors import ModelError


class NarrowAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads together are not as wide as its embedding.

    torch's own forward takes the one width for the other. Parameters, their names and the
    arguments of a call are the same; only what the heads are computed with differs in width.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what torch's would, and the attention's weights where they are needed.

        Raises:
            ModelError: `is_causal` without a mask, which torch refuses, too.
        """
        if is_causal and attn_mask is None:
            raise ModelError("is_causal is a hint about attn_mask, which is missing")
        q, k, v = heads_of(self, query, key, value)
        mask = _additive(self, q, k, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
            return joined(self, out, query), None
        products = q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)
        weights = (products if mask is None else products + mask).softmax(-1)
        weights = F.dropout(weights, dropout)
        returned = weights.mean(1) if average_attn_weights else weights
        return joined(self, weights @ v, query), returned if query.ndim == 3 else returned[0]


def narrow_attention_(module: nn.MultiheadAttention) -> None:
    """Let an attention whose parameters were resized run at its new widths.

    Args:
        module: changed in place. It stays of torch's own class where that takes the widths.
    """
    packed = module.in_proj_weight is not None
    weight = module.in_proj_weight if packed else module.q_proj_weight
    inner = len(weight) // 3 if packed else len(weight)
    module.embed_dim = weight.shape[1]
    module.kdim = module.embed_dim if packed else module.k_proj_weight.shape[1]
    module.vdim = module.embed_dim if packed else module.v_proj_weight.shape[1]
    if inner != module.embed_dim and type(module) is nn.MultiheadAttention:
        module.__class__ = NarrowAttention
        # torch's encoder layers go by it: their fused kernel has no other width for the heads
        module._qkv_same_embed_dim = False


def heads_of(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values [images, heads, tokens, width] of what a call is given."""
    inputs = _images_first(module, query, key, value)
    q, k, v = _projected(module, *inputs)
    if module.bias_k is not None and module.bias_v is not None:
        k, v = (
            F.pad(x, (0, 0, 0, 1)) + F.pad(more.expand(len(x), 1, -1), (0, 0, x.shape[1], 0))
            for x, more in ((k, module.bias_k), (v, module.bias_v))
        )
    q, k, v = (x.view(*x.shape[:2], module.num_heads, -1).transpose(1, 2) for x in (q, k, v))
    if module.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    return q, k, v


def joined(module: nn.MultiheadAttention, heads: Tensor, query: Tensor) -> Tensor:
    """Return heads [images, heads, tokens, width] as an attention's output, laid out as asked."""
    out: Tensor = module.out_proj(heads.transpose(1, 2).flatten(2))
    if query.ndim == 2:
        return out.squeeze(0)
    return out if module.batch_first else out.transpose(0, 1)


def _images_first(module: nn.MultiheadAttention, *inputs: Tensor) -> list[Tensor]:
    """Return the inputs [images, tokens, width]; what was one tensor stays one."""
    turned: dict[int, Tensor] = {}
    for x in inputs:
        if id(x) not in turned:
            whole = x.unsqueeze(0) if x.ndim == 2 else x
            turned[id(x)] = whole if module.batch_first or x.ndim == 2 else x.transpose(0, 1)
    return [turned[id(x)] for x in inputs]


def _projected(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, ...]:
    weights: tuple[Tensor, ...]
    if module.in_proj_weight is None:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    elif query is key is value:
        return F.linear(query, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    else:
        weights = module.in_proj_weight.chunk(3)
    bias = module.in_proj_bias
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return tuple(
        F.linear(x, weight, bias)
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )


def _additive(
    module: nn.MultiheadAttention,
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor | None:
    """Return both masks as one that is added to products [images, heads, queries, keys]."""
    found: Tensor | None = None
    if attn_mask is not None:
        found = _numbers(attn_mask, q)
        found = found.view(len(q), -1, *found.shape[1:]) if found.ndim == 3 else found
    if key_padding_mask is not None:
        padding = _numbers(key_padding_mask, q).view(len(q), 1, 1, -1)
        found = padding if found is None else found + padding
    if found is None:
        return None
    return F.pad(found, (0, k.shape[-2] - found.shape[-1]))  # for keys beside those given


def _numbers(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype.is_floating_point:
        return mask
    return like.new_zeros(mask.shape).masked_fill(mask, -math.inf)
