"""Putting torch-pruning's groups together from what the tracer found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import Dependency, Node

from robust_prune.errors import UsageError
from robust_prune.graph.costs import weight_of
from robust_prune.graph.cutting import Axis, Remaining
from robust_prune.graph.items import Group, paired, table
from robust_prune.graph.roots import Units, handler_of, inputs_per_column, is_mixing
from robust_prune.graph.tracing import Slot
from robust_prune.graph.wiring import Wiring


class Assembly:
    """Puts torch-pruning's groups together, in the numbers that channels have now."""

    def __init__(
        self,
        wiring: Wiring,
        remaining: Remaining,
        modules: Mapping[str, nn.Module],
        nodes: Mapping[Any, Node],
        parameters: Mapping[Axis, Node],
    ) -> None:
        """Start from what is stored where.

        Args:
            wiring: the groups as they were traced.
            remaining: what is left of them.
            modules: of the network by their names.
            nodes: torch-pruning's, by module or parameter.
            parameters: those of parameters that belong to none of its layers, by axis.
        """
        self._wiring, self._remaining = wiring, remaining
        self._modules, self._nodes, self._parameters = modules, nodes, parameters
        self._names = {module: name for name, module in modules.items()}
        self._axes: dict[Axis, list[tuple[str, Slot]]] = {}
        self._along: dict[str, Axis] = {}
        self._tellings: dict[tuple[str, Axis | None], list[tuple[Slot, bool]]] = {}
        for group in wiring.groups:
            for slot in wiring.slots[group.name]:
                self._axes.setdefault((slot.tensor, slot.dim), []).append((group.name, slot))
                if slot.role == "along":
                    self._along.setdefault(slot.layer, (slot.tensor, slot.dim))

    def axis(self, target: Any, side: str) -> Axis:
        """Return which dimension of which tensor holds one side of a layer, or a parameter."""
        for axis, node in self._parameters.items():
            if node.module is target:
                return axis
        name = self._names[target]
        if not is_mixing(target):
            return self._along.get(name, (f"{name}.weight", 0))
        first = int(bool(getattr(target, "transposed", False)))
        depthwise = inputs_per_column(target) is None
        return f"{name}.weight", first if side == "out" or depthwise else 1 - first

    def units_of(self, target: Any, side: str, wanted: Sequence[int]) -> dict[str, Tensor]:
        """Return by group which units, by their traced numbers, channels of a layer belong to.

        Raises:
            UsageError: some have to stay.
        """
        axis = self.axis(target, side)
        entries = torch.tensor(wanted, dtype=torch.long)
        columns = inputs_per_column(target) if side == "in" else 1
        if columns is None:  # depthwise: a channel in is a block of channels out
            each = target.out_channels // target.in_channels
            entries = (entries[:, None] * each + torch.arange(each)).reshape(-1)
        elif columns > 1:
            entries = entries % (target.in_channels // columns)
        found: dict[str, Tensor] = {}
        hit = torch.zeros(len(entries), dtype=torch.bool)
        for group, slot in self._axes.get(axis, ()):
            here = self._remaining.slot(group, slot)
            mine = torch.isin(entries, here.indices)
            units = torch.unique(here.units[torch.isin(here.indices, entries)])
            if not len(units):
                continue
            hit |= mine
            found[group] = self._remaining.units(group)[units]
        if not bool(hit.all()):
            raise UsageError(self._why_fixed(target, axis, entries[~hit].tolist()))
        return found

    def _why_fixed(self, target: Any, axis: Axis, channels: Sequence[int]) -> str:
        layer = axis[0].rpartition(".")[0]
        reasons = {item.name: item.reason for item in self._wiring.unprunable}
        some = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
        return (
            f"channels {some} of {self._called(target)} have to stay: "
            f"{reasons.get(layer, 'they go with channels that have to')}"
        )

    def _called(self, target: Any) -> str:
        return self._names.get(target) or type(target).__name__

    def fill(self, group: Group, target: Any, pruning_fn: Any, side: str) -> Group:
        """Give a group its items, the first for the root.

        Args:
            group: knows its units.
            target: the root: a layer, a parameter or a module that only counts units.
            pruning_fn: torch-pruning's function for its side.
            side: `out` or `in`.
        """
        node = self._nodes[target]
        root_axis = None if isinstance(target, Units) else self.axis(target, side)
        items: dict[tuple[Axis, int], list[tuple[list[int], list[int]]]] = {}
        of_root: list[int] = []
        for name, units in group.units.items():
            chosen = torch.searchsorted(self._remaining.units(name), units)
            root = self._root_places(name, root_axis, target, side)[chosen]
            of_root += root.reshape(-1).tolist()
            group.root_units[name] = root.reshape(-1), chosen.repeat_interleave(root.shape[1])
            for slot, parts in self._told(name, root_axis):
                held = self._table(name, slot)[chosen]
                module = self._modules[slot.layer]
                columns = inputs_per_column(module) if slot.role == "in" else 1
                if columns == root.shape[1] > 1 == held.shape[1]:
                    held = _of_all_groups(held, module, columns)
                for part, places in enumerate(torch.split(held, 1 if parts else held.shape[1], 1)):
                    key = (slot.tensor, slot.dim), part
                    items.setdefault(key, []).append(paired(places, root))
        of_root.sort()
        group.add(Dependency(pruning_fn, pruning_fn, node, node), of_root, list(of_root))
        source, trigger = self._source(node, pruning_fn)
        for ((tensor, dim), _), pairs in items.items():
            handler, aim = self._handler(tensor, dim)
            group.add(Dependency(trigger, handler, source, aim), *_merged(pairs))
        return group

    def makers(self, group: str) -> Iterator[Slot]:
        """Yield the slots of the layers that make a group's channels."""
        for slot in self._wiring.slots[group]:
            if slot.role == "out" and is_mixing(self._modules[slot.layer]):
                yield slot

    def layers(self, group: str) -> Iterator[Slot]:
        """Yield the slots of layers that make a group's channels, then of those that read them."""
        yield from self.makers(group)
        for slot in self._wiring.slots[group]:
            if slot.role == "in" and is_mixing(self._modules[slot.layer]):
                yield slot

    def channels(self, group: str, slot: Slot, units: Mapping[str, Tensor]) -> list[int]:
        """Return where a slot of a group holds some of its units now, in rising order."""
        chosen = torch.searchsorted(self._remaining.units(group), units[group])
        found: list[int] = self._table(group, slot)[chosen].reshape(-1).sort()[0].tolist()
        return found

    def _source(self, node: Node, pruning_fn: Any) -> tuple[Node, Any]:
        """Return what items are said to follow from: a layer, for pruners that look for it."""
        if isinstance(node.module, Units):
            for slot in self.makers(node.module.group):
                module = self._modules[slot.layer]
                return self._nodes[module], handler_of(module, slot)
        return node, pruning_fn

    def _table(self, group: str, slot: Slot) -> Tensor:
        return table(self._remaining.slot(group, slot), len(self._remaining.units(group)))

    def _root_places(self, group: str, axis: Axis | None, target: Any, side: str) -> Tensor:
        """Return where the root holds the units of a group [units, fold]."""
        if axis is None:
            return torch.arange(len(self._remaining.units(group)))[:, None]
        slot = next(s for name, s in self._axes[axis] if name == group)
        held = self._table(group, slot)
        columns = inputs_per_column(target) if side == "in" else 1
        return held if columns in (1, None) else _of_all_groups(held, target, columns)

    def _told(self, group: str, root: Axis | None) -> list[tuple[Slot, bool]]:
        """Return the slots that become items, and whether a unit's channels each have their own.

        One item for each side of a layer, and each parameter, is what torch-pruning has and its
        pruners count on. But importances take the length of their scores from the first item that
        they know, so behind a root that is no layer, readers come first, part by part.
        """
        if (group, root) not in self._tellings:
            slots: dict[tuple[Any, ...], Slot] = {}
            for slot in self._wiring.slots[group]:
                axis = slot.tensor, slot.dim
                key = axis if axis in self._parameters else (slot.layer, slot.role)
                known = handler_of(self._modules[slot.layer], slot) is not None
                if (known or axis in self._parameters) and axis != root:
                    slots.setdefault(key, slot)
            readers = [slot for slot in slots.values() if slot.role == "in"]
            others = [slot for slot in slots.values() if slot.role != "in"]
            if root is not None:
                told = [(slot, False) for slot in slots.values()]
            else:
                told = [(slot, True) for slot in readers]
                told += [(slot, slot.role != "out" or not readers) for slot in others]
            self._tellings[group, root] = told
        return self._tellings[group, root]

    def _handler(self, tensor: str, dim: int) -> tuple[Any, Node]:
        """Return torch-pruning's function for an axis, and the node that it is called on."""
        if (tensor, dim) in self._parameters:
            return tp.prune_parameter_out_channels, self._parameters[tensor, dim]
        slot = self._axes[tensor, dim][0][1]
        module = self._modules[slot.layer]
        return handler_of(module, slot), self._nodes[module]


def _of_all_groups(places: Tensor, module: nn.Module, groups: int) -> Tensor:
    """Return the inputs of a grouped convolution [units, groups] that its columns are.

    Its weight has the columns of one group; torch-pruning numbers the inputs of all.
    """
    width = weight_of(module).shape[1 - int(bool(getattr(module, "transposed", False)))]
    return (places[:, None] + width * torch.arange(groups)[:, None]).reshape(len(places), -1)


def _merged(pairs: list[tuple[list[int], list[int]]]) -> tuple[list[int], list[int]]:
    """Return one item of those that several groups have in the same place, indices rising."""
    if len(pairs) == 1:
        return pairs[0]
    both = sorted(pair for indices, roots in pairs for pair in zip(indices, roots, strict=True))
    return [i for i, _ in both], [r for _, r in both]
