"""The named groups of a network, and where their channels are stored."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_prune.graph.tracing import Count, Coupling, Slot, find
from robust_prune.types import ChannelGroup, Unprunable

MIN_WIDTH = 2


@dataclass(frozen=True)
class Wiring:
    """Groups by name with their slots, and what else follows their widths.

    `names` are those of the coupling's groups by their numbers. `group_of` says by layer in which
    group it was traced, whether that can be pruned or not.
    """

    groups: tuple[ChannelGroup, ...]
    slots: Mapping[str, tuple[Slot, ...]]
    gates: Mapping[str, tuple[Slot, ...]]
    unprunable: tuple[Unprunable, ...]
    coupling: Coupling
    names: Mapping[int, str]
    group_of: Mapping[str, str]

    @classmethod
    def of(cls, net: nn.Module, coupling: Coupling, min_width: int) -> Wiring:
        """Name the groups of a coupling after the first layer that makes their channels."""
        order = {name: i for i, name in enumerate(_tensor_names(net))}
        found: list[tuple[int, int, int, tuple[Slot, ...]]] = []
        unprunable: dict[str, str] = dict(coupling.fixed)
        for g, slots in enumerate(coupling.groups):
            slots = tuple(sorted(slots, key=lambda s: (order[s.tensor], s.dim)))
            makers = [s for s in slots if s.role == "out"]
            if not makers:
                continue
            read = any(s.role == "in" for s in slots) or coupling.gates[g]
            if not read and g not in coupling.outputs:
                unprunable.setdefault(makers[0].layer, "no layer reads its channels")
                continue
            if coupling.sizes[g] < 2:
                unprunable.setdefault(makers[0].layer, "its channels can only go all together")
                continue
            found.append((order[makers[0].tensor], int(makers[0].indices[0]), g, slots))
        found.sort(key=lambda item: item[:2])
        makers_of = [next(s for s in slots if s.role == "out") for *_, slots in found]
        titles = [maker.tensor.removesuffix(".weight") for maker in makers_of]
        groups, named, gates, names = [], {}, {}, {}
        for (_, _, g, slots), maker, name in zip(found, makers_of, titles, strict=True):
            if titles.count(name) > 1:
                name = f"{name}@{int(maker.indices[0])}"
            groups.append(_group(name, maker, slots, coupling.sizes[g], min_width))
            named[name], gates[name], names[g] = slots, coupling.gates[g], name
        for maker in makers_of:
            unprunable.pop(maker.layer, None)
        return cls(
            groups=tuple(groups),
            slots=named,
            gates=gates,
            unprunable=tuple(Unprunable(name, why) for name, why in unprunable.items()),
            coupling=coupling,
            names=names,
            group_of={layer: g.name for g in groups for layer in (*g.members, *g.readers)},
        )

    def names_after(self, gone: Mapping[str, Tensor]) -> dict[str, str]:
        """Return, by the name that each group has once units are gone, its name here.

        Groups that share a tensor are told by their first channel in it, which moves. One that is
        left with a single unit is no group any more.

        Args:
            gone: by group, True [units] for the units that go.
        """
        found: dict[str, str] = {}
        sharing: dict[str, list[tuple[int, str]]] = {}
        for g, name in self.names.items():
            title, shared, first = name.rpartition("@")
            if not shared:
                found[name] = name
                continue
            maker = next(
                s
                for s in self.coupling.groups[g]
                if s.tensor.removesuffix(".weight") == title and int(s.indices[0]) == int(first)
            )
            left = ~gone.get(name, torch.zeros(self.coupling.sizes[g], dtype=torch.bool))
            if int(left.sum()) < 2:
                continue
            here = int(maker.indices[left[maker.units]][0])
            before = sum(
                int((s.indices[mask[s.units]] < here).sum())
                for other, mask in gone.items()
                for s in self.slots[other]
                if (s.tensor, s.dim) == (maker.tensor, maker.dim)
            )
            sharing.setdefault(title, []).append((here - before, name))
        for title, places in sharing.items():
            for place, name in places:
                found[f"{title}@{place}" if len(places) > 1 else title] = name
        return found

    def without(self, broken: Mapping[str, str]) -> Wiring:
        """Return the wiring in which some groups count as unprunable, with the reasons."""
        return Wiring(
            groups=tuple(g for g in self.groups if g.name not in broken),
            slots={n: s for n, s in self.slots.items() if n not in broken},
            gates=self.gates,
            unprunable=(
                *self.unprunable,
                *(Unprunable(name, reason) for name, reason in broken.items()),
            ),
            coupling=self.coupling,
            names=self.names,
            group_of=self.group_of,
        )

    def channels(self, without: Mapping[str, str]) -> int:
        """Return how many entries of tensors the groups lie along, some groups left out."""
        return sum(
            len(slot.indices)
            for name, slots in self.slots.items()
            if name not in without
            for slot in slots
        )

    def possible_ties(self, broken: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        """Return pairs of dimensions, as `tensor:dim`, that the code may couple without saying so.

        Between broken groups: the columns of a projection, which reads an attention's inner
        channels, with those of the layer that reads its input, where the code takes the one width
        for the other; and the rows of layers whose widths one number of a module counts.
        """
        made = {s.tensor: n for n, slots in self.slots.items() for s in slots if s.role == "out"}
        read = {
            s.tensor: (n, s) for n, slots in self.slots.items() for s in slots if s.role == "in"
        }
        ties = []
        for first, (inner, slot) in read.items():
            for second, maker in made.items():
                outer, reader = read.get(second, ("", slot))
                if maker != inner or outer == inner or not {inner, outer} <= set(broken):
                    continue
                if len(reader.indices) == len(slot.indices):
                    ties.append((f"{first}:1", f"{second}:1"))
        counted: dict[tuple[str, int], list[str]] = {}
        for count in self.coupling.counts:
            for g, *_ in count.where:
                if self.names.get(g) in broken:
                    counted.setdefault((count.owner, count.value), []).append(self.names[g])
        for groups in counted.values():
            makers = [
                next(s for s in self.slots[name] if s.role == "out")
                for name in dict.fromkeys(groups)
            ]
            for other in makers[1:]:
                if len(other.indices) == len(makers[0].indices):
                    pair = (f"{makers[0].tensor}:{makers[0].dim}", f"{other.tensor}:{other.dim}")
                    ties.append(pair)
        lengths = self.coupling.lengths
        return tuple(pair for pair in dict.fromkeys(ties) if len({lengths[e] for e in pair}) == 1)

    @functools.cached_property
    def partners(self) -> Mapping[str, frozenset[str]]:
        """By group the groups of its size whose width the code may take for its own."""
        named = {f"{s.tensor}:{s.dim}": n for n, slots in self.slots.items() for s in slots}
        found: dict[str, set[str]] = {}
        for pair in self.possible_ties(dict.fromkeys(self.slots, "")):
            if not named.keys() >= set(pair):  # columns are written as `:1`, not all are there
                continue
            one, other = (named[end] for end in pair)
            found.setdefault(one, set()).add(other)
            found.setdefault(other, set()).add(one)
        return {name: frozenset(others) for name, others in found.items()}

    @functools.cached_property
    def followers(self) -> frozenset[str]:
        """One of each two partners: the groups that stay whole while the others go."""
        found: set[str] = set()
        for group in self.groups:
            if group.name not in found:
                found |= self.partners.get(group.name, frozenset())
        return frozenset(found)

    def wider_ties(self, broken: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        """Return layers' rows and columns, as `tensor:dim`, that may have to go together.

        Of layers between two broken groups, such as that of queries and keys in one: the code may
        take the input's width for the width of each.
        """
        lengths, made = self.coupling.lengths, dict[str, str]()
        for name in broken:
            made |= {s.tensor: name for s in self.slots.get(name, ()) if s.role == "out"}
        ties = [
            (f"{slot.tensor}:{1 - slot.dim}", f"{slot.tensor}:{slot.dim}")
            for name in broken
            for slot in self.slots.get(name, ())
            if slot.role == "in" and made.get(slot.tensor, name) != name
        ]
        return tuple(pair for pair in ties if lengths[pair[0]] % lengths[pair[1]] == 0)

    def units(self, group: str) -> int:
        """Return how many units a group has, whether it can be pruned or not."""
        return self._sizes[group]

    @functools.cached_property
    def _sizes(self) -> Mapping[str, int]:
        return {name: self.coupling.sizes[g] for g, name in self.names.items()}

    def scaled_rows(self, share: Mapping[str, float]) -> dict[str, list[tuple[Tensor, float]]]:
        """Return by tensor which rows pruning multiplies, and by what.

        An attention divides by the root of its head's width, which the rows of queries make up for.

        Args:
            share: by group, which share of its units stays.
        """
        rows: dict[str, dict[tuple[int, ...], float]] = {}
        for _, slots, g in self.coupling.scaled:
            name = self.names.get(g, "")
            for slot in slots if name in share else ():
                rows.setdefault(slot.tensor, {})[tuple(slot.indices.tolist())] = share[name] ** 0.5
        return {t: [(torch.tensor(i), f) for i, f in pairs.items()] for t, pairs in rows.items()}

    def normalised(self, dropped: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """Return by module and full width which channels stay of those it counts."""
        found: dict[str, dict[int, Tensor]] = {}
        for count in self.coupling.counts:
            kept = self.kept(count, dropped)
            if not bool(kept.all()):
                found.setdefault(count.owner, {})[count.value] = kept.nonzero().squeeze(1)
        return found

    def standardised(
        self, modules: Mapping[str, nn.Module], dropped: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, int]]:
        """Return which columns stay, of how many, where weights are standardised over them."""
        found: dict[str, Tensor] = {}
        for name, gone in dropped.items():
            for slot in self.slots[name]:
                module = modules[slot.layer]
                if slot.role == "in" and find(module) and isinstance(module, nn.Conv2d):
                    whole = torch.ones(module.weight.shape[1], dtype=torch.bool)
                    kept = found.setdefault(slot.layer, whole)
                    kept[slot.indices[gone[slot.units]]] = False
        return {n: (kept.nonzero().squeeze(1), len(kept)) for n, kept in found.items()}

    def kept(self, count: Count, dropped: Mapping[str, Tensor]) -> Tensor:
        """Return True [value] for the channels of a count that stay."""
        kept = torch.ones(count.value, dtype=torch.bool)
        for g, indices, units in count.where:
            gone = dropped.get(self.names.get(g, ""))
            if gone is not None:
                kept[indices[gone[units]]] = False
        return kept


def _group(
    name: str, maker: Slot, slots: tuple[Slot, ...], units: int, min_width: int
) -> ChannelGroup:
    width = len(maker.indices)
    blocks = width // units
    order = maker.units.tolist()
    regular = all(unit == i % units for i, unit in enumerate(order))
    return ChannelGroup(
        name=name,
        width=width,
        blocks=blocks,
        min_width=min(width, max(min_width, blocks)),
        members=tuple(dict.fromkeys(s.layer for s in slots if s.role != "in")),
        readers=tuple(dict.fromkeys(s.layer for s in slots if s.role == "in")),
        units_of=() if regular else tuple(order),
    )


def _tensor_names(net: nn.Module) -> list[str]:
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in net.named_modules()
        for name, _ in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        )
    ]
