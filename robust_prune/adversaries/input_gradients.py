"""Gradients of images in the channels_last layout, without torch's backward pass in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robust_prune.errors import AttackError
from robust_prune.modules import plain_layout

LAST = torch.channels_last
WIDE = 16  # channel counts that are multiples of it are no narrow layers, see `plain_layout`


class ImageGradients(nn.Module):
    """A model on images that want a gradient, computed channels last.

    Layers that `_takes` knows compute their input's gradient themselves, mostly as a convolution
    with flipped weights: a forward pass, which is sound in this layout, where torch's backward
    pass of narrow layers is not (see `plain_layout`). Weights get no gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take over a model whose parameters are its own tensors, as `Folded` returns it."""
        super().__init__()
        self.model = model
        for module in model.modules():
            if _takes(module):
                module.__dict__["forward"] = _Layer(module)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, K] of images [N, C, H, W], whose gradient has the plain layout."""
        logits: Tensor = self.model(_Relaid.apply(images))
        return logits


class OnlyPlainBackward(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises AttackError before torch's backward pass of a convolution meets another layout."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if "convolution_backward" in str(func):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            if any(tensor.stride() != plain_layout(tensor).stride() for tensor in tensors):
                raise AttackError("the backward pass of a convolution would run channels last")
        return func(*args, **(kwargs or {}))


def _takes(module: nn.Module) -> bool:
    """Whether a module is a plain convolution whose input gradient `_Layer` can compute."""
    return (
        type(module) is nn.Conv2d
        and "weight" in module._parameters
        and "forward" not in vars(module)
        and module.groups == 1
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and all(p < k for p, k in zip(module.padding, module.kernel_size, strict=True))
    )


class _Layer:
    """A convolution's forward pass, and what the gradient of its input needs."""

    def __init__(self, layer: Any) -> None:
        self.stride, self.padding, self.kernel = layer.stride, layer.padding, layer.kernel_size
        weight = layer.weight.detach()
        self.weight, self.bias = weight.contiguous(memory_format=LAST), layer.bias
        self.plain = plain_layout(weight)
        self.flipped = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=LAST)
        self.is_wide = all(channels % WIDE == 0 for channels in weight.shape[:2])

    def __call__(self, features: Tensor) -> Tensor:
        result: Tensor = _Convolution.apply(features, self)
        return result

    def gradient(self, slope: Tensor, shape: torch.Size) -> Tensor:
        """Return the gradient of an input of that shape from the gradient of the output."""
        slope = slope.contiguous(memory_format=LAST)
        if self.stride == (1, 1):
            around = [k - 1 - p for k, p in zip(self.kernel, self.padding, strict=True)]
            return F.conv2d(slope, self.flipped, None, 1, around)
        if self.kernel == (1, 1):
            spread = slope.new_empty(shape).to(memory_format=LAST).zero_()
            spread[:, :, :: self.stride[0], :: self.stride[1]] = F.conv2d(slope, self.flipped)
            return spread
        if self.is_wide:
            sizes = zip(
                shape[2:], slope.shape[2:], self.stride, self.padding, self.kernel, strict=True
            )
            rest = [size - ((n - 1) * step - 2 * p + k) for size, n, step, p, k in sizes]
            return F.conv_transpose2d(slope, self.weight, None, self.stride, self.padding, rest)
        given, *_ = torch.ops.aten.convolution_backward(
            *(plain_layout(slope), slope.new_empty(shape), self.plain, None),
            *(self.stride, self.padding, (1, 1), False, (0, 0), 1, (True, False, False)),
        )
        return given  # type: ignore[no-any-return]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, layer: _Layer) -> Tensor:
        ctx.layer, ctx.shape = layer, features.shape
        features = features.contiguous(memory_format=LAST)
        return F.conv2d(features, layer.weight, layer.bias, layer.stride, layer.padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.gradient(slope, ctx.shape), None


class _Relaid(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=LAST)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(_: Any, slope: Tensor) -> Tensor:
        return plain_layout(slope)
