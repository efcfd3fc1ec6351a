"""The masked model: full size, with the channels that a plan drops silenced. What pruning means."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robust_prune.graph.tracing import Slot, find
from robust_prune.graph.wiring import Wiring


@torch.no_grad()
def silence_(net: nn.Module, wiring: Wiring, dropped: Mapping[str, Tensor]) -> None:
    """Silence units of groups in place: same outputs as without them, at full size.

    All their parameters become zero, rows that make them and columns that read them, but for
    variances: a frozen norm may divide by one. Where a normalisation spans them, its statistics
    run over the kept channels alone, which is what it does in the pruned model.

    Args:
        net: the network.
        wiring: where the groups' channels are.
        dropped: by group, True [units] for those that go.
    """
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for name, gone in dropped.items():
        for slot in wiring.slots[name]:
            zero_(tensors[slot.tensor], slot, slot.indices[gone[slot.units]])
    modules = dict(net.named_modules())
    statistics = _Statistics(
        wiring.normalised(dropped),
        wiring.standardised(modules, dropped),
        {name for name, module in modules.items() if find(module)},
        wiring.coupling.softmaxes,
    )
    if statistics.kept or statistics.columns:
        for name, module in modules.items():
            module.register_forward_pre_hook(_Enter(statistics.running, name))
            module.register_forward_hook(_Leave(statistics.running))
        net.__class__ = type(f"Masked{type(net).__name__}", (_Masked, type(net)), {})
        net._statistics = statistics  # type: ignore[assignment]


def zero_(tensor: Tensor, slot: Slot, entries: Tensor) -> None:
    """Set entries of a tensor that holds channels to zero; variances stay, as divisors may."""
    if slot.tensor.rpartition(".")[2] != "running_var":
        tensor.index_fill_(slot.dim, entries.to(tensor.device), 0.0)


def with_statistics(net: nn.Module) -> AbstractContextManager[Any]:
    """Let parts of a silenced network run as they do inside of it."""
    return _KeptChannels(net._statistics) if isinstance(net, _Masked) else nullcontext()


@dataclass
class _Statistics:
    """Which channels count, by the module whose forward is running."""

    kept: Mapping[str, Mapping[int, Tensor]]
    columns: Mapping[str, tuple[Tensor, int]]
    averaging: set[str]
    softmaxes: frozenset[str]
    running: list[str] = field(default_factory=list)


class _Enter:
    """A hook that survives deep copies together with what it writes to."""

    def __init__(self, running: list[str], name: str) -> None:
        self.running, self.name = running, name

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        self.running.append(self.name)


class _Leave:
    def __init__(self, running: list[str]) -> None:
        self.running = running

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.running.pop()


class _Masked(nn.Module):
    """Mixed into the class of a masked network."""

    _statistics: _Statistics

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _KeptChannels(self._statistics):
            return super().forward(*args, **kwargs)


class _KeptChannels(TorchFunctionMode):
    """Takes the statistics of norms over the kept channels, and leaves the others at zero."""

    def __init__(self, statistics: _Statistics) -> None:
        super().__init__()
        self.statistics = statistics

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = str(getattr(func, "__name__", "")), kwargs or {}
        owner = self.statistics.running[-1] if self.statistics.running else ""
        kept = self.statistics.kept.get(owner, {})
        if name in NORMS and args[0].shape[NORMS[name]] in kept:
            return _normalise(func, NORMS[name], kept, args, kwargs)
        if name == "softmax" and owner in self.statistics.softmaxes:
            return _normalise_square(func, kept, args, kwargs)
        if name in ("mean", "var") and owner in self.statistics.averaging:
            return _average(func, kept, args, kwargs)
        if name == "batch_norm" and owner in self.statistics.columns:
            return _standardise(func, *self.statistics.columns[owner], args, kwargs)
        return func(*args, **kwargs)


NORMS = {"layer_norm": -1, "rms_norm": -1, "group_norm": 1}


def _normalise(
    func: Any, dim: int, by_width: Mapping[int, Tensor], args: tuple[Any, ...], kwargs: Any
) -> Tensor:
    x, second, *rest = args
    kept = by_width[x.shape[dim]].to(x.device)
    options = {**kwargs, **dict(zip(("weight", "bias", "eps"), rest, strict=False))}
    if func.__name__ == "rms_norm" and len(rest) > 1:
        options = {**kwargs, **dict(zip(("weight", "eps"), rest, strict=False))}
    for key in ("weight", "bias"):
        if options.get(key) is not None:
            options[key] = options[key][kept]
    part = x.index_select(dim, kept)
    done = func(part, second if dim == 1 else (len(kept),), **options)
    return torch.zeros_like(x).index_copy_(dim, kept, done)


def _normalise_square(
    func: Any, by_width: Mapping[int, Tensor], args: tuple[Any, ...], kwargs: Any
) -> Tensor:
    """Take a softmax over the kept columns of a product of channels with channels."""
    x, *rest = args
    kept = by_width.get(x.shape[-1])
    if kept is None or x.shape[-1] != x.shape[-2]:
        found: Tensor = func(x, *rest, **kwargs)
        return found
    kept = kept.to(x.device)
    done = func(x.index_select(-1, kept), *rest, **kwargs)
    return torch.zeros_like(x).index_copy_(-1, kept, done)


def _average(
    func: Any, by_width: Mapping[int, Tensor], args: tuple[Any, ...], kwargs: Any
) -> Tensor:
    """Average over the kept channels alone, where the average runs over channels."""
    x, *rest = args
    dims = rest[0] if rest else kwargs.get("dim")
    for dim in dims if isinstance(dims, (tuple, list)) else (dims,):
        if dim is not None and x.shape[dim] in by_width:
            x = x.index_select(dim, by_width[x.shape[dim]].to(x.device))
    done: Tensor = func(x, *rest, **kwargs)
    return done


def _standardise(
    func: Any, columns: Tensor, size: int, args: tuple[Any, ...], kwargs: Any
) -> Tensor:
    """Standardise the weights [1, out, in * kernel] of a convolution over kept columns only."""
    weight, kept = args[0], columns.to(args[0].device)
    blocks = weight.view(1, weight.shape[1], size, -1)
    part = blocks.index_select(2, kept)
    done = func(part.flatten(2), *args[1:], **kwargs).view(part.shape)
    return torch.zeros_like(blocks).index_copy_(2, kept, done).view(weight.shape)
