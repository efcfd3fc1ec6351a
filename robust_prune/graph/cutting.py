"""Removing channels, and what is left of the groups while it goes on part after part."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from robust_prune.graph.tracing import HEAD_NUMBERS, Count, Slot
from robust_prune.graph.wiring import Wiring
from robust_prune.modules import Fields, narrow_, set_fields_

# numbers in modules that happen to equal a width, but never are one
NO_WIDTH = re.compile(
    "num|heads|groups|window|kernel|stride|padding|patch|image|img|grid|dilat|depth|ratio|index|"
    "resolution|pool|radix|shift|scale_factor|factor|level|feat_size|output_size|training"
)
# numbers that follow the shapes of a module's parameters, whatever its heads are as wide as
BY_SHAPE = {nn.MultiheadAttention: ("embed_dim", "kdim", "vdim")}
STANDARD = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm)

Axis = tuple[str, int]  # a tensor's name and one of its dimensions


class Remaining:
    """Removes units of groups from a network, and knows where the others are afterwards.

    The wiring keeps the numbers of the network that was traced. What has gone since is kept
    beside it, by group and by tensor, so that a cut visits the tensors that it narrows and no
    other: to renumber all slots after each of a DenseNet's 120 cuts would take most of a minute.
    """

    def __init__(self, wiring: Wiring, net: nn.Module) -> None:
        """Start from the network that was traced, or a copy of it, before anything is cut."""
        self.gone: dict[str, Tensor] = {}
        self._wiring, self._net = wiring, net
        self._modules = dict(net.named_modules())
        self._left: dict[Axis, Tensor] = {}  # traced numbers of the entries that are left
        self._numbers: dict[str, Mapping[str, Any]] = {}  # of modules, as they were traced
        self._counts: dict[str, list[Count]] = {}  # by the module that counts
        self._counting: dict[str, set[str]] = {}  # by group, the modules that count it
        for count in wiring.coupling.counts:
            if isinstance(self._modules[count.owner], STANDARD):
                continue
            self._counts.setdefault(count.owner, []).append(count)
            for g, *_ in count.where:
                self._counting.setdefault(wiring.names.get(g, ""), set()).add(count.owner)
        self._depthwise = {
            name
            for name, module in self._modules.items()
            if isinstance(module, _ConvNd) and module.groups == module.in_channels > 1
        }

    def units(self, group: str) -> Tensor:
        """Return the traced numbers of the units that are left of a group, in rising order."""
        gone = self.gone.get(group)
        if gone is None:
            return torch.arange(self._wiring.units(group))
        return (~gone).nonzero().squeeze(1)

    def slot(self, group: str, slot: Slot) -> Slot:
        """Return a slot in the numbers of the tensor and the units that are there now."""
        gone, left = self.gone.get(group), self._left.get((slot.tensor, slot.dim))
        if gone is None and left is None:
            return slot
        indices, units = slot.indices, slot.units
        if gone is not None:
            stays = ~gone[units]
            indices, units = indices[stays], (~gone).cumsum(0)[units[stays]] - 1
        if left is not None:
            indices = torch.searchsorted(left, indices)
        return replace(slot, indices=indices, units=units)

    @torch.no_grad()
    def remove_(self, dropped: Mapping[str, Tensor]) -> None:
        """Remove units of groups from the network.

        Args:
            dropped: by group, True [units as traced] for those that go; those that went before
                may be among them.
        """
        fresh, share = self._advance(dropped)
        rows = {
            tensor: [(self._here(tensor, indices), factor) for indices, factor in pairs]
            for tensor, pairs in self._wiring.scaled_rows(share).items()
        }
        fields = self._fields(share)  # before layers set their own
        narrow_(self._modules, self._narrowed(fresh), rows, self._depthwise)
        set_fields_(self._net, fields, self._modules)

    def _advance(self, dropped: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Note what goes; return by group which units go now, and the share that stays."""
        fresh: dict[str, Tensor] = {}
        share: dict[str, float] = {}
        for name, mask in dropped.items():
            before = self.gone.get(name, torch.zeros_like(mask))
            now = mask & ~before
            if bool(now.any()):
                self.gone[name] = before | now
                fresh[name] = now
                share[name] = int((~self.gone[name]).sum()) / int((~before).sum())
        return fresh, share

    def _here(self, tensor: str, rows: Tensor) -> Tensor:
        """Return where the rows that are left of a tensor's traced ones are now."""
        left = self._left.get((tensor, 0))
        if left is None:
            return rows
        return torch.searchsorted(left, rows[torch.isin(rows, left)])

    def _narrowed(self, fresh: Mapping[str, Tensor]) -> dict[Axis, Tensor]:
        """Return by axis which entries of today's tensor stay, and note which those are."""
        stays: dict[Axis, Tensor] = {}
        for name, now in fresh.items():
            for slot in self._wiring.slots[name]:
                axis = slot.tensor, slot.dim
                if axis not in self._left:
                    self._left[axis] = torch.arange(self._size(axis))
                left = self._left[axis]
                mask = stays.setdefault(axis, torch.ones(len(left), dtype=torch.bool))
                mask[torch.searchsorted(left, slot.indices[now[slot.units]])] = False
        for axis, mask in stays.items():
            self._left[axis] = self._left[axis][mask]
        return {axis: mask.nonzero().squeeze(1) for axis, mask in stays.items()}

    def _size(self, axis: Axis) -> int:
        layer, _, leaf = axis[0].rpartition(".")
        return int(getattr(self._modules[layer], leaf).shape[axis[1]])

    def _fields(self, groups: Mapping[str, float]) -> Fields:
        """Return what the numbers in modules that count channels of these groups become."""
        fields: Fields = {}
        for owner in {o: None for name in groups for o in sorted(self._counting.get(name, ()))}:
            for name, value in self._followed(owner).items():
                if value != getattr(self._modules[owner], name):
                    fields.setdefault(owner, {})[name] = value
        for owner, slots, g in self._wiring.coupling.scaled:
            scale = self._traced(owner).get("scale")
            gone = self.gone.get(self._wiring.names.get(g, ""))
            if self._wiring.names.get(g) not in groups or gone is None:
                continue
            width = self._head_width(owner, g)
            if (
                isinstance(scale, float)
                and width
                and math.isclose(scale, width**-0.5, rel_tol=1e-6)
            ):
                share = float((~gone[slots[0].units]).double().mean())
                fields.setdefault(owner, {})["scale"] = (width * share) ** -0.5
        return fields

    def _traced(self, owner: str) -> Mapping[str, Any]:
        """Return a module's numbers as they were before the first cut."""
        if owner not in self._numbers:
            self._numbers[owner] = {
                name: value
                for name, value in vars(self._modules[owner]).items()
                if type(value) in (int, float, tuple, list)
            }
        return self._numbers[owner]

    def _followed(self, owner: str) -> dict[str, Any]:
        """Return by name a module's numbers of channels as they are to be now."""
        widths: dict[int, set[int]] = {}
        for count in self._counts[owner]:
            left = int(self._wiring.kept(count, self.gone).sum())
            widths.setdefault(count.value, set()).add(left)
        known = {old: new.pop() for old, new in widths.items() if len(new) == 1}
        module = self._modules[owner]
        by_shape = [
            n for kind, names in BY_SHAPE.items() if isinstance(module, kind) for n in names
        ]
        heads = self._wiring.coupling.whole_heads  # else their number stays
        found = {
            name: value
            for name, value in self._traced(owner).items()
            if not name.startswith("_")
            and name not in by_shape
            and type(value) is not float
            and (heads if name in HEAD_NUMBERS else not NO_WIDTH.search(name))
        }
        ambiguous = [v for n, v in found.items() if n in HEAD_NUMBERS and type(v) is int]
        return {
            name: _follow(value, known)
            for name, value in found.items()
            if value not in ambiguous or name in HEAD_NUMBERS
        }

    def _head_width(self, owner: str, g: int) -> int:
        """Return the width of one head: the smallest number of these channels that is counted."""
        counted = [
            c.value
            for c in self._wiring.coupling.counts
            if c.owner == owner and any(group == g for group, _, _ in c.where)
        ]
        return min(counted, default=0)


def _follow(value: Any, known: Mapping[int, int]) -> Any:
    if isinstance(value, int):
        return known.get(value, value)
    if all(type(v) is int for v in value):
        return type(value)(known.get(v, v) for v in value)
    return value
