"""What a model costs: multiply-adds and parameters, exactly, as a function of its widths."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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
from robust_prune.graph.tracing import adapted, name_of, work_of
from robust_prune.modules import checked, device_of, evaluating, network_of
from robust_prune.types import Cost

Use = tuple[int, tuple[tuple[int, tuple[tuple[str, int], ...]], ...]]


def times_at(use: Use, dropped: Mapping[str, int]) -> int:
    """Return how often, when groups lose this many units.

    Args:
        use: how often in the dense model, and the sizes in that product that shrink with groups,
            each with (group, channels per unit).
        dropped: by group.
    """
    times, sizes = use
    for size, shares in sizes:
        left = size - sum(channels * dropped.get(group, 0) for group, channels in shares)
        times = times * left // size
    return times


@dataclass(frozen=True)
class TensorCost:
    """What a parameter costs: its name, its shape, and its positions if it mixes channels.

    `shares` lists (dimension, group, channels per unit): what a unit of a group takes away.
    `uses` lists how often an image meets it, call by call.
    """

    name: str
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
        return numel * sum(times_at(use, dropped) for use in self.uses), numel


@dataclass(frozen=True)
class EmptyCost:
    """What goes with a block whose branch goes whole.

    Attributes:
        inside: names of the tensors that go.
        constant: the tensor that comes.
    """

    inside: frozenset[str]
    constant: TensorCost


@dataclass(frozen=True)
class WorkCost:
    """What a model costs as a function of its widths: its parameters, and products beside them.

    `products` are those that no parameter is a factor of as a layer's weight is: between
    activations, as in an attention, by computed weights, and of recurrent cells, which stay whole.
    """

    tensors: tuple[TensorCost, ...]
    products: tuple[Use, ...]

    def at(self, dropped: Mapping[str, int], empty: Iterable[EmptyCost] = ()) -> tuple[int, int]:
        """Return (multiply-adds, parameters) when groups lose this many units.

        Args:
            dropped: by group.
            empty: blocks that go whole, with all units of their groups.
        """
        macs, params = self.of_weights(dropped, empty)
        return macs + sum(times_at(use, dropped) for use in self.products), params

    def layers(self, dropped: Mapping[str, int]) -> dict[str, int]:
        """Return how many weights each layer has that groups touch, when they lose these units.

        Counted are tensors that mix channels, not biases and norms, by the module that has them.
        """
        found: dict[str, int] = {}
        for tensor in self.tensors:
            if tensor.shares and tensor.uses:
                layer = tensor.name.rpartition(".")[0]
                found[layer] = found.get(layer, 0) + tensor.at(dropped)[1]
        return found

    def of_weights(
        self, dropped: Mapping[str, int], empty: Iterable[EmptyCost] = ()
    ) -> tuple[int, int]:
        """Return the same without the products, as plans of earlier versions count."""
        macs = params = 0
        empty = tuple(empty)
        gone = frozenset[str]().union(*(block.inside for block in empty))
        for tensor in (*self.tensors, *(block.constant for block in empty)):
            if tensor.name not in gone:
                m, p = tensor.at(dropped)
                macs, params = macs + m, params + p
        return macs, params


@torch.no_grad()
def count_cost(model: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Count multiply-adds and parameters of the model as it is, no channels.

    Counted are all products for one image: of convolutions, linear layers and recurrent cells, of
    queries with keys and of attentions with values, and of any other matmul or einsum. Biases,
    normalisation and what is entrywise are not. `uncounted_work` names what is left.

    Raises:
        ModelError: the network does not take such images.
    """
    net = network_of(model)
    parameters = list(net.parameters())
    counter = Counter(parameters)
    with checked(input_size), evaluating(net), adapted(net), counter:
        net(example_image(net, input_size))
    return Cost(counter.macs, sum(p.numel() for p in parameters), None)


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


class Counter(TorchFunctionMode):
    """Adds up the multiply-adds of every torch function that is called."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.macs = 0
        self._parameters = {id(p) for p in parameters}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        weights, products = work_of(name_of(func), args, kwargs, out, self._is_parameter)
        self.macs += sum(weight.numel() * positions for weight, positions in weights)
        self.macs += sum(math.prod(size for size, _ in product) for product in products)
        return out

    def _is_parameter(self, tensor: Tensor) -> bool:
        return id(tensor) in self._parameters
