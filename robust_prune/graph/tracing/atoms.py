"""Atoms: the identities of single channels, and which of them can only go together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

FIXED = 0  # the atom of everything that has to stay


class Atoms:
    """Union-find over integers, on whole arrays at a time; atom 0 stands for what must stay."""

    def __init__(self) -> None:
        self._parent = np.zeros(1, dtype=np.int64)
        self._stays = np.ones(1, dtype=bool)
        self._count = 1

    def new(self, count: int) -> Tensor:
        """Return `count` fresh atoms [count]."""
        start, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            old, size = len(self._parent), max(self._count, 2 * len(self._parent))
            self._parent = np.concatenate([self._parent, np.arange(old, size, dtype=np.int64)])
            self._stays = np.concatenate([self._stays, np.zeros(size - old, dtype=bool)])
        return torch.arange(start, self._count)

    def find(self, atoms: Tensor) -> Tensor:
        """Return what stands for each atom's set, in the same shape: 0 if the set must stay."""
        roots = self._roots(atoms.numpy())
        return torch.from_numpy(np.where(self._stays[roots], FIXED, roots)).view(atoms.shape)

    def family(self, atoms: Tensor) -> Tensor:
        """Return what stands for each atom's set, whether it must stay or not."""
        return torch.from_numpy(self._roots(atoms.numpy())).view(atoms.shape)

    def join(self, first: Tensor, second: Tensor) -> None:
        """Make each atom of `first` go with its counterpart in `second`, after broadcasting."""
        first, second = torch.broadcast_tensors(first, second)  # type: ignore[no-untyped-call]
        pairs = np.stack([self._roots(t.contiguous().numpy()).ravel() for t in (first, second)])
        fixed = (pairs == FIXED).any(0)
        self._stays[pairs[:, fixed]] = True
        pairs = pairs[:, ~fixed]
        before = np.unique(pairs)
        while True:
            pairs = pairs[:, pairs[0] != pairs[1]]
            if not pairs.size:
                break
            np.minimum.at(self._parent, pairs.max(0), pairs.min(0))
            pairs = self._roots(pairs)
        np.logical_or.at(self._stays, self._roots(before), self._stays[before])

    def fix(self, atoms: Tensor) -> None:
        """Make these atoms stay."""
        self._stays[self._roots(atoms.contiguous().numpy())] = True

    def _roots(self, atoms: np.ndarray) -> np.ndarray:
        while True:
            up = self._parent[atoms]
            if np.array_equal(up, atoms):
                return np.ascontiguousarray(up)
            atoms = self._parent[up]


def zeros(ndim: int) -> Tensor:
    """Return the label of a tensor without channels."""
    return torch.zeros([1] * ndim, dtype=torch.long)


def compress(label: Tensor, *, by_value: bool = False) -> Tensor:
    """Shrink every dimension to size 1 along which a label does not change.

    Dimensions of stride 0 are known not to; `by_value` compares the atoms of the others as well.
    """
    for dim in range(label.ndim):
        if label.shape[dim] > 1:
            first = label.narrow(dim, 0, 1)
            if label.stride(dim) == 0 or (by_value and bool((label == first).all())):
                label = first
    return label


def alike(roots: Sequence[np.ndarray]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield sets of roots that lie along the same axes equally often, and the axes' numbers.

    In the order in which the first of each is found; roots that stay are left out.
    """
    if not roots:
        return
    counted = [np.unique(values, return_counts=True) for values in roots]
    root = np.concatenate([values for values, _ in counted])
    times = np.concatenate([number for _, number in counted])
    axis = np.repeat(np.arange(len(counted)), [len(values) for values, _ in counted])
    pairs = np.stack([axis, times], 1)
    values, first, count = np.unique(root, return_index=True, return_counts=True)
    order = np.argsort(root, kind="stable")
    ends = np.cumsum(count)
    sets: dict[bytes, tuple[list[int], list[int]]] = {}
    for i in np.argsort(first).tolist():
        if values[i] != FIXED:
            mine = order[ends[i] - count[i] : ends[i]]
            key = pairs[mine].tobytes()
            if key not in sets:
                sets[key] = axis[mine].tolist(), []
            sets[key][1].append(int(values[i]))
    yield from sets.values()


def places(axes: Iterable[Tensor], whole: Sequence[bool], others: Sequence[int]) -> np.ndarray:
    """Return by raw atom [2, atoms] in which axis and at which index it is stored, -1 in none.

    Args:
        axes: the atoms along each.
        whole: of which of them all atoms count; of the others only those among `others`.
        others: raw atoms.
    """
    held = [atoms.contiguous().numpy() for atoms in axes]
    found = np.full((2, 1 + max((int(a.max()) for a in held if len(a)), default=0)), -1)
    for axis, (atoms, all_count) in enumerate(zip(held, whole, strict=True)):
        index = np.arange(len(atoms))
        if not all_count:
            index = index[np.isin(atoms, others)]
        found[0, atoms[index]] = axis
        found[1, atoms[index]] = index
    return found
