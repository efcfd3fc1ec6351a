"""The masked model: full size, with the channels that a plan drops silenced. What pruning means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robust_prune.wiring import Wiring


@torch.no_grad()
def silence_(net: nn.Module, wiring: Wiring, dropped: Mapping[str, Tensor]) -> None:
    """Silence units of groups in place: same outputs as without them, at full size.

    All their parameters become zero, rows that make them and columns that read them. Where a
    normalisation spans them, its statistics run over the kept channels alone, which is what it
    does in the pruned model.

    Args:
        net: the network.
        wiring: where the groups' channels are.
        dropped: by group, True [units] for those that go.
    """
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for name, gone in dropped.items():
        for slot in wiring.slots[name]:
            entries = slot.indices[gone[slot.units]]
            tensor = tensors[slot.tensor]
            tensor.index_fill_(slot.dim, entries.to(tensor.device), 0.0)
    modules = dict(net.named_modules())
    for owner, kept in wiring.normalised(dropped).items():
        _wrap(modules[owner], _KeptStatistics(kept))
    for owner, (columns, size) in wiring.standardised(modules, dropped).items():
        _wrap(modules[owner], _KeptColumns(columns, size))


def _wrap(module: nn.Module, mode: TorchFunctionMode) -> None:
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return inner(*args, **kwargs)

    module.forward = forward


class _KeptStatistics(TorchFunctionMode):
    """Normalises over some channels only, and leaves the others at zero."""

    def __init__(self, kept: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.kept = dict(kept)  # by full width

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(getattr(func, "__name__", ""))
        if name in ("mean", "var"):
            return self._mean(func, args, kwargs or {})
        dim = {"layer_norm": -1, "rms_norm": -1, "group_norm": 1}.get(name)
        if dim is None or args[0].shape[dim] not in self.kept:
            return func(*args, **(kwargs or {}))
        x, second, *rest = args
        kept = self.kept[x.shape[dim]].to(x.device)
        options = dict(kwargs or {})
        for i, key in enumerate(("weight", "bias", "eps")[: len(rest)]):
            options[key] = rest[i]
        for key in ("weight", "bias"):
            if options.get(key) is not None:
                options[key] = options[key][kept]
        part = x.index_select(dim, kept)
        done = func(part, second if name == "group_norm" else (len(kept),), **options)
        return torch.zeros_like(x).index_copy_(dim, kept, done)

    def _mean(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Average over the kept channels alone, where the average runs over channels."""
        x, *rest = args
        dims = rest[0] if rest else kwargs.get("dim")
        dims = dims if isinstance(dims, (tuple, list)) else (dims,)
        for dim in dims:
            if dim is not None and x.shape[dim] in self.kept:
                x = x.index_select(dim, self.kept[x.shape[dim]].to(x.device))
        return func(x, *rest, **kwargs)


class _KeptColumns(TorchFunctionMode):
    """Standardises the weights of a convolution over some of its input channels only."""

    def __init__(self, kept: Tensor, size: int) -> None:
        super().__init__()
        self.kept, self.size = kept, size

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        weight, kept = args[0], self.kept.to(args[0].device)
        blocks = weight.view(1, weight.shape[1], self.size, -1)
        part = blocks.index_select(2, kept)
        done = func(part.flatten(2), *args[1:], **(kwargs or {})).view(part.shape)
        return torch.zeros_like(blocks).index_copy_(2, kept, done).view(weight.shape)
