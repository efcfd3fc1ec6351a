"""A group in torch-pruning's terms: dependencies with indices, and with channels of the root."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch_pruning as tp
from torch import Tensor
from torch_pruning._helpers import GroupItem

from robust_prune.graph.tracing import Slot
from robust_prune.types import ChannelGroup


class Group(tp.dependency.Group):  # type: ignore[misc]
    """Channels that go together, in every layer that holds them.

    Its items are what importances and regularisers read. Pruning does not go through them: the
    graph cuts the whole group at once, with what no item can say (biases, buffers, numbers in
    modules, the scale of an attention).

    `units` are the units to remove, by the group's name in the graph, in the numbers that they
    had when the network was traced. They stay right while other groups are cut.
    """

    def __init__(self, graph: Any, units: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._DG = graph
        self.units = units
        # by name (channels of the root, the units they belong to), both as they are numbered now
        self.root_units: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def graph(self) -> Any:
        """The graph that this group is of."""
        return self._DG

    def at_root(self, values: Mapping[str, Tensor], other: float = 0.0) -> Tensor:
        """Return values of units, as an importance gives them: one for each index of the root.

        Args:
            values: by the group's name in the graph, [units that are left].
            other: of channels that belong to no unit.
        """
        channels = torch.tensor(self[0].idxs)
        found = torch.full((len(channels),), other, dtype=torch.float64)
        for name, (mine, units) in self.root_units.items():
            found[torch.searchsorted(channels, mine)] = values[name][units].double()
        return found

    def prune(self, idxs: Any = None, record_history: bool = True) -> None:
        """Remove the channels from the network, or those of the root that are given instead."""
        if idxs is not None:
            dep = self[0].dep
            self._DG.get_pruning_group(dep.target.module, dep.handler, idxs).prune(
                record_history=record_history
            )
            return
        line = self._DG.line_of(self)  # in the numbers before the cut
        self._DG.cut_(self.units)
        if record_history:
            self._DG.pruning_history().append(line)

    def by_unit(self, values: Tensor) -> dict[str, Tensor]:
        """Return by name what an importance gave the root of a whole group, for each unit [units].

        Where the root has several channels for a unit, the largest counts.

        Args:
            values: [indices of the root].
        """
        channels = torch.tensor(self[0].idxs)
        found = {}
        for name, (mine, units) in self.root_units.items():
            least = torch.full((len(self.units[name]),), -torch.inf, dtype=values.dtype)
            places = torch.searchsorted(channels, mine)
            found[name] = least.scatter_reduce(0, units, values[places], "amax")
        return found

    def add(self, dep: Any, idxs: list[int], root_idxs: list[int]) -> None:
        """Append an item whose i-th index goes with channel `root_idxs[i]` of the root."""
        item = GroupItem(dep, idxs)
        item.root_idxs = root_idxs
        self._group.append(item)


def table(slot: Slot, units: int) -> Tensor:
    """Return where a slot holds each unit [units, times], in rising order."""
    order = slot.units.argsort(stable=True)
    return slot.indices[order].view(units, -1)


def paired(places: Tensor, root: Tensor) -> tuple[list[int], list[int]]:
    """Return the indices of an item in rising order, and the channel of the root for each.

    Where a layer holds a unit more often than the root, that is by turns (queries, keys and
    values, head by head), or side by side where a flatten has spread a channel out. Indices rise,
    as some importances sort them in place, which must not part them from their channels.

    Args:
        places: [units, times] where the layer holds the units.
        root: [units, fold] where the root holds them.
    """
    times, fold = places.shape[1], root.shape[1]
    if times == fold == 1:
        indices, order = places.reshape(-1).sort()
        return indices.tolist(), root.reshape(-1)[order].tolist()
    if times % fold:
        root, fold = root[:, :1], 1
    spread = times // fold
    side_by_side = bool((places.view(len(places), fold, spread).diff(dim=2) == 1).all())
    root = root.repeat_interleave(spread, 1) if side_by_side else root.repeat(1, spread)
    indices, order = places.reshape(-1).sort()
    return indices.tolist(), root.reshape(-1)[order].tolist()


class Groups(Protocol):
    """A graph that says which channels go together, and where they are stored."""

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """The groups that can be pruned."""

    def slots(self, group: str) -> tuple[Slot, ...]:
        """Return where a group's channels are stored."""

    def gates(self, group: str) -> tuple[Slot, ...]:
        """Return the rows of queries, whose channels nothing but a product reads."""

    def group_of(self, name: str) -> Group:
        """Return a whole group in torch-pruning's terms, as its importances take it."""
