"""From a traced forward pass to groups of channels, by the tensors that they are stored in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from robust_prune.errors import PlanError
from robust_prune.graph.tracing import mixing as mixing
from robust_prune.graph.tracing import moving as moving
from robust_prune.graph.tracing.adapters import adapted
from robust_prune.graph.tracing.atoms import FIXED, alike, places
from robust_prune.graph.tracing.groups import Count, Coupling, Slot, Times
from robust_prune.graph.tracing.rules import RULES
from robust_prune.graph.tracing.tracer import Labels, Tracer, following
from robust_prune.graph.tracing.training import trace_training
from robust_prune.modules import tensors_in

Run = Callable[[nn.Module], Any]


def couple(
    net: nn.Module,
    run: Run,
    protected: Mapping[str, str],
    ties: Sequence[tuple[str, str]] = (),
    whole_heads: bool = False,
    outputs_stay: bool = True,
    train_runs: tuple[Run, Run] | None = None,
) -> Coupling:
    """Trace a network in eval mode on one example, and what train mode adds; return its groups.

    Args:
        net: left as it was.
        run: runs it, on one image where costs are to be counted.
        protected: why a layer's outputs must stay, by its dotted name.
        ties: pairs of dimensions, as `tensor:dim`, that have to go together although the forward
            does not say so.
        whole_heads: an attention loses whole heads, not the same dims of every head.
        outputs_stay: the channels of what it returns can't be removed.
        train_runs: run it in train mode, with values and on the meta device; None where that is
            not to be followed.
    """
    tracer = Tracer(net, RULES, whole_heads)
    with torch.no_grad(), adapted(net), following(net, tracer), tracer:
        out = run(net)
    trains = train_runs is not None and trace_training(net, *train_runs, tracer, outputs_stay)
    labels = tracer.labels
    outputs = [tracer.returned(tensor) for tensor in tensors_in((out,))]
    for atoms in outputs if outputs_stay else ():
        labels.fix(atoms, "its channels are the model's outputs")
    book = _Book(net, labels)
    for name, reason in protected.items():
        book.protect(name, reason)
    for first, second in ties:
        book.tie(first, second)
    return replace(book.close(outputs), trains=trains, whole_heads=whole_heads)


class _Book:
    """Which tensor each atom is stored in."""

    def __init__(self, net: nn.Module, labels: Labels) -> None:
        self.labels, self.atoms = labels, labels.atoms
        self.names = {id(t): name for name, t in _tensors(net)}
        self.stored = set(self.names.values())
        self.modules = dict(net.named_modules())
        self.out_dims = {self.names[key]: dim for key, dim in labels.out_dims.items()}
        self.where: np.ndarray | None = None
        self.axes: dict[tuple[str, int], Tensor] = {
            (self.names[key], dim): atoms for (key, dim), atoms in labels.axes.items()
        }
        by_tensor = {key for key, _ in labels.axes}
        for key, entries in labels.entries.items():
            if key in by_tensor or entries.numel() == 1:
                labels.fix(entries.reshape(-1), "a weight that is also used by itself")
                for other, dim in list(labels.axes):
                    if other == key:
                        labels.fix(labels.axes[other, dim], "a weight that is also used by itself")
        self._one_dimension_each(by_tensor)

    def _one_dimension_each(self, layers: set[int]) -> None:
        """Find along which dimension a parameter outside of layers has its channels."""
        while True:
            changed = False
            for key, entries in self.labels.entries.items():
                if key in layers or entries.numel() == 1:
                    continue
                roots = self.atoms.find(entries)
                dims = [
                    d
                    for d in range(roots.ndim)
                    if roots.shape[d] > 1 and not bool((roots == roots.narrow(d, 0, 1)).all())
                ]
                if len(dims) > 1:
                    self.labels.fix(entries.reshape(-1), "a parameter with channels in two ways")
                    changed = True
                elif dims:
                    line = tuple(slice(None) if d == dims[0] else 0 for d in range(roots.ndim))
                    self.axes[self.names[key], dims[0]] = entries[line]
            if not changed:
                return

    def protect(self, layer: str, reason: str) -> None:
        """Let the outputs of a layer stay, or the channels that a norm has weights for."""
        for axes in (self.out_dims.items(), self.axes):
            mine = [axis for axis in axes if axis[0].rpartition(".")[0] == layer]
            if mine:
                break
        for axis in mine:
            if axis in self.axes:
                self.labels.fix(self.axes[axis], reason)

    def tie(self, first: str, second: str) -> None:
        for name in (first, second):
            if _axis(name) not in self.axes:
                raise PlanError(f"the plan ties {name!r}, which this network does not have")
        a, b = self.axes[_axis(first)], self.axes[_axis(second)]
        if len(a) % len(b):
            raise PlanError(
                f"the plan ties {first!r}, {len(a)} channels, to {second!r}, {len(b)} channels; "
                "only a dimension and one of its length, or a multiple of it, can go together"
            )
        self.atoms.join(a.view(-1, len(b)), b.view(1, -1))

    def close(self, outputs: Sequence[Tensor]) -> Coupling:
        keys = list(self.axes)
        roots = {
            key: self.atoms.find(atoms.contiguous()).numpy() for key, atoms in self.axes.items()
        }
        unit_of: dict[int, tuple[int, int]] = {}
        slots: list[tuple[Slot, ...]] = []
        sizes: list[int] = []
        for axes, members in alike([roots[key] for key in keys]):
            first = keys[axes[0]]
            mine = set(members)
            order = np.array([r for r in dict.fromkeys(roots[first].tolist()) if r in mine])
            unit_of.update({root: (len(slots), u) for u, root in enumerate(order.tolist())})
            arrange = np.argsort(order)
            found = order[arrange], arrange
            slots.append(tuple(self._slot(keys[i], roots[keys[i]], *found) for i in axes))
            sizes.append(len(order))
        uses = {
            self.names[key]: tuple(self._times(n, vectors, unit_of) for n, vectors in found)
            for key, found in self.labels.uses.items()
        }
        products = tuple(self._times(n, found, unit_of) for n, found in self.labels.products)
        if self._fix_uneven((*itertools.chain(*uses.values()), *products), sizes, slots):
            return self.close(outputs)
        return Coupling(
            groups=tuple(slots),
            sizes=tuple(sizes),
            gates=self._gates(len(slots), unit_of),
            scaled=self._scaled(unit_of),
            counts=self._counts(unit_of),
            uses=uses,
            products=products,
            fixed=self._fixed(roots),
            outputs=frozenset(g for atoms in outputs for g in self._groups_of(atoms, unit_of)),
            softmaxes=frozenset(self.labels.softmaxes),
            lengths={f"{name}:{dim}": len(atoms) for (name, dim), atoms in self.axes.items()},
        )

    def _times(
        self, times: int, vectors: Sequence[Tensor], unit_of: Mapping[int, tuple[int, int]]
    ) -> Times:
        counts = tuple(Count("", len(v), self._count_where(v, unit_of)) for v in vectors)
        return times, tuple(count for count in counts if count.where)

    def _fix_uneven(
        self, times: Sequence[Times], sizes: Sequence[int], groups: Sequence[tuple[Slot, ...]]
    ) -> bool:
        """Make groups stay whose units some work counts unevenly: no width says what they cost."""
        uneven = {
            g
            for _, counts in times
            for count in counts
            for g, _, units in count.where
            if len(set(torch.bincount(units, minlength=sizes[g]).tolist())) > 1
        }
        for g in uneven:
            slot = groups[g][0]
            self.labels.fix(
                self.axes[slot.tensor, slot.dim][slot.indices], "its channels cost unequally much"
            )
        return bool(uneven)

    def _slot(
        self, key: tuple[str, int], roots: np.ndarray, ordered: np.ndarray, units: np.ndarray
    ) -> Slot:
        """Return where an axis holds a group's roots, given in rising order with their units."""
        place = np.minimum(np.searchsorted(ordered, roots), len(ordered) - 1)
        hit = ordered[place] == roots
        return self._at(
            key, torch.from_numpy(np.flatnonzero(hit)), torch.from_numpy(units[place[hit]])
        )

    def _at(self, key: tuple[str, int], indices: Tensor, units: Tensor) -> Slot:
        tensor, dim = key
        layer = tensor.rpartition(".")[0]
        role = "along"
        if tensor in self.out_dims:
            role = "out" if dim == self.out_dims[tensor] else "in"
        return Slot(tensor, dim, indices, units, role, layer)

    def _where(self, atoms: Tensor) -> dict[int, tuple[tuple[str, int], int]]:
        """Return where those of raw atoms that belong to layers' weights and biases are stored."""
        keys = list(self.axes)
        if self.where is None:
            layers = [name.endswith("weight") or name in self.out_dims for name, _ in keys]
            self.where = places(self.axes.values(), layers, list(self.labels.biases.values()))
        known = atoms[atoms < self.where.shape[1]].numpy()
        axes, indices = self.where[:, known].tolist()
        return {
            atom: (keys[axis], index)
            for atom, axis, index in zip(known.tolist(), axes, indices, strict=True)
            if axis >= 0
        }

    def _rows(self, atoms: Tensor, unit_of: Mapping[int, tuple[int, int]]) -> dict[int, list[Slot]]:
        """Return by group the slots in which raw atoms are stored."""
        biases = self.labels.biases
        beside = [biases[atom] for atom in atoms.tolist() if atom in biases]
        atoms = torch.cat([atoms.reshape(-1), torch.tensor(beside, dtype=torch.long)])
        where = self._where(atoms)
        found: dict[tuple[int, tuple[str, int]], list[tuple[int, int]]] = {}
        for atom, root in zip(
            atoms.tolist(), self.atoms.find(atoms.contiguous()).tolist(), strict=True
        ):
            if root in unit_of and atom in where:
                group, unit = unit_of[root]
                key, index = where[atom]
                found.setdefault((group, key), []).append((index, unit))
        rows: dict[int, list[Slot]] = {}
        for (group, key), pairs in found.items():
            indices, units = torch.tensor(pairs).T
            rows.setdefault(group, []).append(self._at(key, indices, units))
            bias = f"{key[0].removesuffix('weight')}bias"
            if bias in self.stored:
                rows[group].append(self._at((bias, 0), indices, units))
        return rows

    def _gates(
        self, groups: int, unit_of: Mapping[int, tuple[int, int]]
    ) -> tuple[tuple[Slot, ...], ...]:
        gates: list[list[Slot]] = [[] for _ in range(groups)]
        for atoms in self.labels.gates:
            for group, slots in self._rows(atoms, unit_of).items():
                gates[group] += slots
        return tuple(tuple(slots) for slots in gates)

    def _scaled(
        self, unit_of: Mapping[int, tuple[int, int]]
    ) -> tuple[tuple[str, tuple[Slot, ...], int], ...]:
        return tuple(
            (owner, tuple(slots), group)
            for owner, atoms in self.labels.scaled
            for group, slots in self._rows(atoms, unit_of).items()
        )

    def _counts(self, unit_of: Mapping[int, tuple[int, int]]) -> tuple[Count, ...]:
        found = {}
        for site in self.labels.sites:
            where = self._count_where(site.atoms, unit_of)
            if where:
                key = site.owner, site.value, tuple((g, len(i)) for g, i, _ in where)
                found[key] = Count(site.owner, site.value, where)
        return tuple(found.values())

    def _count_where(
        self, atoms: Tensor, unit_of: Mapping[int, tuple[int, int]]
    ) -> tuple[tuple[int, Tensor, Tensor], ...]:
        by_group: dict[int, list[tuple[int, int]]] = {}
        for index, root in enumerate(self.atoms.find(atoms.contiguous()).tolist()):
            if root in unit_of:
                group, unit = unit_of[root]
                by_group.setdefault(group, []).append((index, unit))
        return tuple(
            (g, torch.tensor([i for i, _ in pairs]), torch.tensor([u for _, u in pairs]))
            for g, pairs in by_group.items()
        )

    def _groups_of(self, atoms: Tensor, unit_of: Mapping[int, tuple[int, int]]) -> set[int]:
        roots = set(self.atoms.find(atoms.contiguous()).tolist())
        return {unit_of[root][0] for root in roots if root in unit_of}

    def _fixed(self, roots: Mapping[tuple[str, int], np.ndarray]) -> dict[str, str]:
        """Say why layers have outputs that stay."""
        reasons: dict[str, str] = {}
        for (tensor, dim), values in roots.items():
            layer, _, leaf = tensor.rpartition(".")
            if self._makes_channels(layer, leaf, dim):
                stay = self.axes[tensor, dim][torch.from_numpy(values == FIXED)]
                if len(stay):
                    reasons[layer] = self._why(stay)
        return reasons

    def _makes_channels(self, layer: str, leaf: str, dim: int) -> bool:
        module = self.modules[layer]
        if isinstance(module, nn.MultiheadAttention):
            return self.out_dims.get(f"{layer}.{leaf}") == dim
        known = isinstance(module, (_ConvNd, nn.Linear)) and leaf == "weight"
        return known and dim == _out_dim(module)

    def _why(self, atoms: Tensor) -> str:
        families = set(self.atoms.family(atoms.contiguous()).tolist())
        for fixed, reason in self.labels.reasons:
            if families & set(self.atoms.family(fixed).tolist()):
                return reason
        return "coupled with channels that have to stay"


def _tensors(net: nn.Module) -> list[tuple[str, Tensor]]:
    return [*net.named_parameters(), *net.named_buffers()]


def _axis(name: str) -> tuple[str, int]:
    tensor, _, dim = name.rpartition(":")
    return tensor, int(dim) if dim.isdigit() else 0


def _out_dim(module: nn.Module) -> int:
    return 1 if isinstance(module, _ConvTransposeNd) else 0
