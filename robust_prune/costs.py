"""What layers cost: multiply-adds and parameters, exactly, as a function of their widths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from robust_prune.errors import ModelError
from robust_prune.modules import (
    device_of,
    evaluating,
    network_of,
)
from robust_prune.types import Cost


@dataclass(frozen=True)
class Layer:
    """What a layer costs at given widths."""

    out_channels: int
    in_channels: int
    groups: int
    depthwise: bool
    kernel: int
    positions: int
    bias: int
    mixes: bool

    def cost(self, out_channels: int, in_channels: int) -> tuple[int, int]:
        """Return (multiply-adds, parameters)."""
        if not self.mixes:
            return 0, self.kernel * out_channels
        per_output = 1 if self.depthwise else in_channels // self.groups
        weights = out_channels * per_output * self.kernel
        return weights * self.positions, weights + self.bias * out_channels


def count_cost(model: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Count multiply-adds and parameters of the model as it is; `channels` is 0.

    Counted are the multiply-adds of convolutions and linear layers for one image, without biases
    and normalisation, the convention of the pruning literature.
    """
    net = network_of(model)
    positions = output_positions(net, input_size)
    macs = 0
    for module, count in positions.items():
        macs += weight_of(module).numel() * count
    return Cost(macs, sum(p.numel() for p in net.parameters()), 0)


def weight_of(layer: nn.Module) -> nn.Parameter:
    """Return the weight of a convolution or linear layer."""
    weight = layer.weight
    if not isinstance(weight, nn.Parameter) or parametrize.is_parametrized(layer):
        raise ModelError(
            f"the weight of a {type(layer).__name__} is computed from other parameters (weight or "
            "spectral norm); remove the parametrization first, as by "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    return weight


def own_params(module: nn.Module) -> bool:
    """Return whether the module itself, not a child, holds parameters."""
    return any(True for _ in module.parameters(recurse=False))


def example_image(net: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    """Return one random image [1, C, H, W] of the network's device and dtype."""
    parameter = next(net.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, *input_size, generator=generator).to(device_of(net), dtype)


@torch.no_grad()
def output_positions(net: nn.Module, input_size: tuple[int, int, int]) -> dict[nn.Module, int]:
    """How often each convolution's or linear layer's weights are applied to one image.

    For a transposed convolution these are the positions of its input.
    """
    positions: dict[nn.Module, int] = {}

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        where = inputs[0] if isinstance(module, _ConvTransposeNd) else output
        shape = where.shape
        spatial = shape[2:] if isinstance(module, _ConvNd) else shape[1:-1]
        positions[module] = positions.get(module, 0) + int(torch.Size(spatial).numel())

    hooks = [
        module.register_forward_hook(count)
        for module in net.modules()
        if isinstance(module, (_ConvNd, nn.Linear))
    ]
    try:
        with evaluating(net):
            net(example_image(net, input_size))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        line = (str(error).splitlines() or [""])[0][:160]
        size = "x".join(map(str, input_size))
        raise ModelError(f"the model does not take a {size} image: {line}") from None
    finally:
        for hook in hooks:
            hook.remove()
    return positions


def describe(module: nn.Module, positions: int) -> Layer:
    """Return what a layer with parameters costs, applied at `positions` places of an image."""
    own = sum(p.numel() for p in module.parameters(recurse=False))
    if isinstance(module, _ConvNd):
        return Layer(
            module.out_channels,
            module.in_channels,
            module.groups,
            depthwise=module.groups == module.in_channels == module.out_channels,
            kernel=int(torch.Size(module.kernel_size).numel()),
            positions=positions,
            bias=int(module.bias is not None),
            mixes=True,
        )
    if isinstance(module, nn.Linear):
        bias = int(module.bias is not None)
        return Layer(
            module.out_features, module.in_features, 1, False, 1, positions, bias, mixes=True
        )
    first = next(module.parameters(recurse=False))
    channels = first.shape[0] if first.ndim else 1
    return Layer(channels, channels, 1, False, own // channels, 0, 0, mixes=False)
