"""What a model costs: multiply-adds and parameters, exactly, as a function of its widths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from robust_prune.errors import ModelError
from robust_prune.graph.tracing import adapted, name_of, weights_applied
from robust_prune.modules import device_of, evaluating, network_of
from robust_prune.types import Cost

Use = tuple[int, tuple[tuple[int, tuple[tuple[str, int], ...]], ...]]


@dataclass(frozen=True)
class TensorCost:
    """What a parameter costs: its shape, and its positions if it mixes channels.

    `shares` lists (dimension, group, channels per unit): what a unit of a group takes away.
    `uses` lists how often an image meets it, call by call: (positions, sizes among them that shrink
    with groups, each with its own shares).
    """

    shape: tuple[int, ...]
    shares: tuple[tuple[int, str, int], ...]
    uses: tuple[Use, ...]

    def at(self, dropped: Mapping[str, int]) -> tuple[int, int]:
        """Return (multiply-adds, parameters) when groups lose this many units."""
        shape = list(self.shape)
        for dim, group, channels in self.shares:
            shape[dim] -= channels * dropped.get(group, 0)
        numel = 1
        for size in shape:
            numel *= size
        positions = 0
        for times, repeats in self.uses:
            for size, shares in repeats:
                left = size - sum(channels * dropped.get(group, 0) for group, channels in shares)
                times = times * left // size
            positions += times
        return numel * positions, numel


def total(tensors: Sequence[TensorCost], dropped: Mapping[str, int]) -> tuple[int, int]:
    """Return (multiply-adds, parameters) of all tensors together."""
    macs = params = 0
    for tensor in tensors:
        m, p = tensor.at(dropped)
        macs, params = macs + m, params + p
    return macs, params


def count_cost(model: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Count multiply-adds and parameters of the model as it is; `channels` is 0.

    Counted are the multiply-adds of convolutions and linear layers for one image, without biases,
    normalisation and the products inside an attention, the convention of the pruning literature.
    """
    net = network_of(model)
    positions = weight_positions(net, input_size)
    macs = sum(p.numel() * positions.get(name, 0) for name, p in net.named_parameters())
    return Cost(macs, sum(p.numel() for p in net.parameters()), 0)


def weight_of(layer: nn.Module) -> nn.Parameter:
    """Return the weight of a convolution or linear layer.

    Raises:
        ModelError: it is computed from other parameters; the message says how to make it plain.
    """
    weight = layer.weight
    if isinstance(weight, nn.Parameter) and not parametrize.is_parametrized(layer):
        return weight
    raise ModelError(
        f"the weight of a {type(layer).__name__} is computed from other parameters (weight norm, "
        f"spectral norm, a mask); make it a plain parameter first, as by {_what_removes(layer)}"
    )


def _what_removes(layer: nn.Module) -> str:
    """Return the call that turns a layer's computed weight into a parameter with its value."""
    if parametrize.is_parametrized(layer):
        return "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
    hooks = list(layer._forward_pre_hooks.values())
    if any(isinstance(hook, SpectralNorm) for hook in hooks):
        return "torch.nn.utils.remove_spectral_norm(layer)"
    if any(isinstance(hook, WeightNorm) for hook in hooks):
        return "torch.nn.utils.remove_weight_norm(layer)"
    if any(isinstance(hook, BasePruningMethod) for hook in hooks):
        return "torch.nn.utils.prune.remove(layer, 'weight')"
    return "layer.weight = torch.nn.Parameter(layer.weight.detach()) and a plain forward"


def example_image(net: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    """Return one random image [1, C, H, W] of the network's device and dtype."""
    parameter = next(net.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, *input_size, generator=generator).to(device_of(net), dtype)


class _Positions(TorchFunctionMode):
    """Counts how often each weight is applied to one image, by the functions that apply it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for weight, times in weights_applied(name_of(func), args, kwargs or {}, out):
            self.found[id(weight)] = self.found.get(id(weight), 0) + times
        return out


@contextlib.contextmanager
def checked(input_size: tuple[int, int, int]) -> Iterator[None]:
    """Turn what a network raises on images of a size that it does not take into a ModelError."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0][:160]
        size = "x".join(map(str, input_size))
        raise ModelError(f"the model does not take a {size} image: {line}") from None


@torch.no_grad()
def weight_positions(net: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """Return how often each weight, by its name, is applied to one image.

    For a transposed convolution these are the positions of its input.

    Raises:
        ModelError: the network does not take such images.
    """
    with checked(input_size), evaluating(net), adapted(net), _Positions() as mode:
        net(example_image(net, input_size))
    return {
        name: mode.found[id(parameter)]
        for name, parameter in net.named_parameters()
        if id(parameter) in mode.found
    }
