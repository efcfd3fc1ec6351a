"""What stands for a group in torch-pruning, and how its pruners are told about folds.

A pruner takes the channel numbers of a group's first item, the root, for positions in the vector
of scores, and later asks for the group of some of them. So the root must hold every unit, in
order. A layer that makes exactly the units does. Where a grouped convolution ties channels of all
its groups, torch-pruning keeps all channels in the root and lets its pruners average the scores
over the groups: they ask each layer for its number of groups. Wherever else a unit has several
channels (queries, keys and values of an attention, two groups in one layer, irregular orders), a
small module that only knows how many units there are is the root, and layers answer 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning import ops

from robust_prune.graph.tracing import Slot
from robust_prune.graph.wiring import Wiring

Side = tuple[str, str]  # a layer's name, and `in` or `out`
KIND = ops.OPTYPE
MIXING = {KIND.CONV, KIND.DEPTHWISE_CONV, KIND.LINEAR}
LAYERS = MIXING | {KIND.BN, KIND.LN, KIND.GN, KIND.IN, KIND.PRELU, KIND.EMBED}


class Units(nn.Module):
    """The root of a group that no layer stands for."""

    def __init__(self, group: str, count: int) -> None:
        super().__init__()
        self.group, self.count = group, count

    def extra_repr(self) -> str:
        """Say whose units these are, as torch-pruning prints it in its groups."""
        return f"{self.count} of {self.group}"


class UnitsPruner(ops.DummyPruner):  # type: ignore[misc]
    """Says how many units a root has; there is nothing to prune in it."""

    def prune_out_channels(self, layer: Units, idxs: Any) -> Units:
        """Do nothing: a group is cut as a whole."""
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Units) -> int:
        """Return the number of units."""
        return layer.count

    get_in_channels = get_out_channels


class LayerPruner:
    """torch-pruning's own pruner of a layer, but for how many groups it folds scores over."""

    def __init__(self, pruner: Any, folds: Mapping[str, int]) -> None:
        self._pruner, self._folds = pruner, folds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pruner, name)

    def get_in_channel_groups(self, layer: nn.Module) -> int:
        """Return over how many groups the scores of its inputs are averaged."""
        return self._folds.get("in", 1)

    def get_out_channel_groups(self, layer: nn.Module) -> int:
        """Return over how many groups the scores of its outputs are averaged."""
        return self._folds.get("out", 1)


@dataclass(frozen=True)
class Root:
    """The layer that stands for a group, None for a module of its own; channels of each unit."""

    slot: Slot | None
    fold: int = 1


def kind_of(module: nn.Module) -> Any:
    """Return torch-pruning's kind of a layer; of convolutions, only true depthwise ones are so.

    It calls every convolution depthwise that has as many groups as outputs.
    """
    kind = ops.module2type(module)
    if kind == ops.OPTYPE.DEPTHWISE_CONV and module.groups != module.in_channels:
        return ops.OPTYPE.CONV
    return kind


def roots_of(
    wiring: Wiring, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, Root], dict[str, dict[str, int]]]:
    """Return what stands for each group, and by layer and side what it folds scores over.

    A layer has one answer for all its groups, so a group whose neighbour in a layer folds
    otherwise gets a root of its own.
    """
    roots = {group.name: _layer_root(wiring.slots[group.name], modules) for group in wiring.groups}
    sides = {name: _sides(wiring.slots[name], modules) for name in roots}
    while True:
        answers: dict[Side, set[int]] = {}
        for name, root in roots.items():
            for side in sides[name]:
                answers.setdefault(side, set()).add(root.fold)
        torn = [
            name
            for name, root in roots.items()
            if root.fold > 1 and any(len(answers[side]) > 1 for side in sides[name])
        ]
        if not torn:
            break
        roots.update(dict.fromkeys(torn, Root(None)))
    folds: dict[str, dict[str, int]] = {}
    for (layer, role), answer in answers.items():
        folds.setdefault(layer, {})[role] = max(answer)
    return roots, folds


def _sides(slots: tuple[Slot, ...], modules: Mapping[str, nn.Module]) -> dict[Side, int]:
    """Return the sides of layers with groups of their own that hold these channels."""
    found = {}
    for slot in slots:
        module = modules[slot.layer]
        groups = inputs_per_column(module) or 1
        if groups > 1 and slot.role != "along":
            found[slot.layer, slot.role] = groups
        elif isinstance(module, nn.GroupNorm):
            found[slot.layer, "out"] = module.num_groups
    return found


def _layer_root(slots: tuple[Slot, ...], modules: Mapping[str, nn.Module]) -> Root:
    """Return the first layer that makes all channels of its own for the group, in order."""
    groups = max(_sides(slots, modules).values(), default=1)
    for slot in slots:
        module = modules[slot.layer]
        if slot.role != "out" or not isinstance(module, (ops.TORCH_CONV, ops.TORCH_LINEAR)):
            continue
        if kind_of(module) == KIND.DEPTHWISE_CONV:
            continue  # importances don't read it, and take the next item's length for the root's
        if module.weight.shape[slot.dim] != len(slot.units):
            continue  # some of its channels are other groups', or stay
        units = int(slot.units.max()) + 1
        fold = len(slot.units) // units
        in_order = torch.equal(slot.units, torch.arange(len(slot.units)) % units)
        if in_order and fold in (1, groups):
            return Root(slot, fold)
    return Root(None)


def handler_of(module: nn.Module, slot: Slot) -> Any:
    """Return torch-pruning's function for what a slot holds, None where it has no such layer.

    Importances and regularisers go by it: it says what the layer is, and which side of it.
    """
    kind = kind_of(module)
    if kind not in LAYERS:
        return None
    pruner = tp.pruner.function.PrunerBox[kind]
    if kind in MIXING:
        if slot.role == "along" or not slot.tensor.endswith("weight"):
            return None
        return pruner.prune_in_channels if slot.role == "in" else pruner.prune_out_channels
    return pruner.prune_out_channels


def is_mixing(module: Any) -> bool:
    """Return whether a module is a convolution or linear layer."""
    return isinstance(module, (ops.TORCH_CONV, ops.TORCH_LINEAR))


def inputs_per_column(module: Any) -> int | None:
    """Return how many inputs a column of a layer's weight reads; None for a depthwise one."""
    if not isinstance(module, ops.TORCH_CONV):
        return 1
    return None if kind_of(module) == KIND.DEPTHWISE_CONV else int(module.groups)
