"""One set of weights out of a file, and everything that is said of the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from robust_prune.models.content import Content
from robust_prune.models.fitting import check_names
from robust_prune.models.matching import (
    ASIDE,
    Choice,
    WeightSet,
    choose,
    find_sets,
    foreign,
    left_over,
    needed,
)
from robust_prune.models.normalisation import Normalisation, from_settings, from_tensors

SILENT_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module"})


@dataclass(frozen=True)
class Weights:
    """The state of a network by its own names, the normalisation of the file, and notes."""

    state: Mapping[str, Tensor]
    channels: int
    normalisation: Normalisation | None
    notes: tuple[str, ...]


def take(path: Path, content: Content, wanted: Mapping[str, Tensor]) -> Weights:
    """Take the weights of a network with the state `wanted` out of a file.

    Raises:
        ModelError: the file lacks some of them, or has parts that the network has not.
    """
    sets, notes = _complete(content, wanted)
    if not sets or sets[0].missing:
        _refuse(path, content, wanted, sets)
    choice = choose(content, sets)
    taken = choice.taken
    state = {name: content.tensors[theirs] for name, theirs in taken.names.items()}
    channels = next((t.shape[1] for t in state.values() if t.ndim == 4), 3)
    left = left_over(content, choice)
    normalisation = from_tensors(left, taken.root, channels)
    names = [n for n in left if normalisation is None or n not in normalisation.names]
    if strange := foreign(content, taken, names, wanted):
        check_names(path, [], strange)
    wrappers = [w for w in taken.wrappers if w.rpartition(".")[2] not in SILENT_WRAPPERS]
    if wrappers:
        notes += (f"what lies around {wrappers[0]!r} in the file is taken to do nothing",)
    names = [name for name in names if left[name].ndim]  # a single number is a metric
    if names:
        more = "" if len(names) == 1 else f" and {len(names) - 1} more"
        notes += (f"the file also holds {names[0]!r}{more}, of which nothing is used",)
    normalisation = normalisation or from_settings(content, channels)
    return Weights(state, channels, normalisation, (*notes, *choice.notes))


def _complete(
    content: Content, wanted: Mapping[str, Tensor]
) -> tuple[list[WeightSet], tuple[str, ...]]:
    """Return the sets in a file; where only a head is missing, with it under its own name."""
    sets = find_sets(content, wanted)
    if not sets or not sets[0].missing:
        return sets, ()
    nearest = sets[0]
    head = _one_module(nearest.missing)
    holder = content.holders[next(iter(nearest.names.values()))]
    candidates: dict[str, dict[str, str]] = {}
    for name in left_over(content, Choice(nearest)):
        layer, _, leaf = name.rpartition(".")
        beside = content.holders[name] == holder and not ASIDE.search(layer)
        if layer.startswith(nearest.root) or beside:
            candidates.setdefault(layer, {})[leaf] = name
    fitting = {
        layer: leaves
        for layer, leaves in candidates.items()
        if head is not None and _same_layer(content, wanted, nearest.missing, leaves)
    }
    if head is None or len(fitting) != 1:
        return sets, ()
    layer, leaves = fitting.popitem()
    names = {name: leaves[name.rpartition(".")[2]] for name in nearest.missing}
    whole = replace(nearest, names={**nearest.names, **names}, missing=())
    return [whole], (f"the network's {head!r} is {layer!r} in the file",)


def _one_module(names: Sequence[str]) -> str | None:
    layers = {name.rpartition(".")[0] for name in names}
    return layers.pop() if len(layers) == 1 else None


def _same_layer(
    content: Content, wanted: Mapping[str, Tensor], names: Sequence[str], leaves: Mapping[str, str]
) -> bool:
    """Return whether these are the missing tensors but for how many outputs they have."""
    if {name.rpartition(".")[2] for name in names} != set(leaves):
        return False
    pairs = [(wanted[n], content.tensors[leaves[n.rpartition(".")[2]]]) for n in names]
    return all(a.ndim == b.ndim and a.shape[1:] == b.shape[1:] for a, b in pairs)


def _refuse(
    path: Path, content: Content, wanted: Mapping[str, Tensor], sets: Sequence[WeightSet]
) -> None:
    if sets:
        used = set(sets[0].names.values())
        root = f"{sets[0].root}." if sets[0].root else ""
        missing: Sequence[str] = sets[0].missing
    else:
        used, root = set(), ""
        missing = [name for name, tensor in wanted.items() if needed(name, tensor)]
    rest = [name for name in content.tensors if name.startswith(root) and name not in used]
    check_names(path, missing, rest)
