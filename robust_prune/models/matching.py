"""Where in a file the weights of a network are, found by the network's own names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robust_prune.models.content import Content

UNCOUNTED = "num_batches_tracked"  # absent from files that are older than it
DEEPEST_NAME, DEEPEST_WRAPPER = 60, 3
# what other libraries leave beside weights: counts of averaged models and of operations
BOOKKEEPING = frozenset({"n_averaged", "total_ops", "total_params", UNCOUNTED})
ASIDE = re.compile(r"loss|criterion|metric|^aux", re.IGNORECASE)
AVERAGES = frozenset(
    {"ema", "swa", "wa", "avg", "average", "averaged", "averaging", "polyak", "shadow"}
)
NEGATIONS = ("not", "non", "no", "without", "un")
SLOW = frozenset({"teacher", "target", "momentum"})
FAST = frozenset({"student", "online"})
KIN = 0.5  # cosine of weights from which on one set counts as the other's running average


@dataclass
class _Node:
    children: dict[str, _Node] = field(default_factory=dict)
    name: str | None = None  # of the tensor here

    def add(self, name: str) -> None:
        node = self
        for part in name.split("."):
            node = node.children.setdefault(part, _Node())
        node.name = name

    def below(self, path: str = "") -> Iterator[tuple[str, _Node]]:
        """Yield (path, node) of this node and all below, in the order of the file."""
        ahead = [(path, self)]
        while ahead:
            here, node = ahead.pop()
            yield here, node
            inner = [(f"{here}.{k}" if here else k, v) for k, v in node.children.items()]
            ahead += reversed(inner)


@dataclass(frozen=True)
class WeightSet:
    """One set of weights: the names of a network's tensors in a file.

    `root` is the way to it, empty for the file's own level. `wrappers` are modules of the file that
    the network does not have, and that hold nothing but what it has.
    """

    root: str
    names: Mapping[str, str]
    missing: tuple[str, ...]
    wrappers: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The set as a message names it."""
        return f"'{self.root}'" if self.root else "the file's own level"


@dataclass(frozen=True)
class Choice:
    """The set that is taken, the others that fit as well, and why it was this one."""

    taken: WeightSet
    others: tuple[WeightSet, ...] = ()
    notes: tuple[str, ...] = ()


def find_sets(content: Content, wanted: Mapping[str, Tensor]) -> list[WeightSet]:
    """Return the sets of weights for a network, whole ones only if there are any, best first.

    The network may be nested in the file in any way, and wrapped at any place: a prefix, or a
    module in between, counts as a wrapper where the network has none of that name and all that it
    misses there is inside.

    Args:
        content: of the file.
        wanted: the network's state, by name; only names and types are looked at.
    """
    file, net = _tree(content.tensors), _tree(wanted)
    found = []
    for root, node in file.below():
        if node.children.keys() & net.children.keys():
            names: dict[str, str] = {}
            wrappers: list[str] = []
            _place(net, node, root, names, wrappers)
            missing = tuple(
                name
                for name, tensor in wanted.items()
                if name not in names and needed(name, tensor)
            )
            if names:
                found.append(WeightSet(root, names, missing, tuple(wrappers)))
    if whole := [s for s in found if not s.missing]:
        return _outermost(whole)
    return sorted(found, key=lambda s: len(s.missing))


def needed(name: str, tensor: Tensor) -> bool:
    """Return whether a network can't do without this entry of its state in a file."""
    return not name.endswith(UNCOUNTED) and tensor.is_floating_point()


def choose(content: Content, sets: Sequence[WeightSet]) -> Choice:
    """Choose among whole sets: a running average before anything else, then the outermost.

    A teacher is a student's running average where their weights point the same way; else it is
    another network that the student has learned from.
    """
    order = sorted(sets, key=lambda s: (s.root.count("."), sets.index(s)))
    fast = next((s for s in sets if _words(s) & FAST), None)
    ranks = {s.root: 0 if is_average(s.root) else 1 + _is_unaveraged(s.root) for s in sets}
    why = {s.root: "the moving average" for s in sets if is_average(s.root)}
    for one in sets:
        if _words(one) & SLOW and not is_average(one.root):
            kin = None if fast is None else _cosine(content, one, fast)
            if kin is not None and kin >= KIN:
                ranks[one.root], why[one.root] = 0, f"the moving average (cosine {kin:.2f})"
            else:
                ranks[one.root] = 2
    taken = min(order, key=lambda s: ranks[s.root])
    others = tuple(s for s in order if s is not taken)
    return Choice(taken, others, _notes(content, taken, others, why))


def is_average(path: str) -> bool:
    """Return whether a name says that running averages are under it."""
    return _averaging(path) is True


def _is_unaveraged(path: str) -> bool:
    return _averaging(path) is False


def _averaging(path: str) -> bool | None:
    """Return whether a name speaks of averages; False where it says that they are not."""
    parted = re.sub(r"([a-z])([A-Z])|([A-Z])(?=[A-Z][a-z])", r"\1\3_\2", path)
    words = re.findall(r"[a-z]+", parted.lower())
    for before, word in zip(["", *words], words, strict=False):
        if word in AVERAGES or re.fullmatch(r"(model|net|weights?)(ema|avg|swa)", word):
            return before not in NEGATIONS
        if any(word.removeprefix(n) in AVERAGES for n in NEGATIONS if word.startswith(n)):
            return False
    return None


def left_over(content: Content, choice: Choice) -> dict[str, Tensor]:
    """Return the tensors that no set uses and that could be weights."""
    used = {name for s in (choice.taken, *choice.others) for name in s.names.values()}
    return {
        name: tensor
        for name, tensor in content.tensors.items()
        if name not in used
        and tensor.is_floating_point()
        and name.rpartition(".")[2] not in BOOKKEEPING
    }


def foreign(
    content: Content, taken: WeightSet, names: Sequence[str], wanted: Mapping[str, Tensor]
) -> list[str]:
    """Return which of the names left over are parts of the file's network that ours has not.

    Those are what lies inside of its modules, or beside them in the same state_dict under the same
    prefix, a loss set aside; and the other layers of an nn.Sequential that it is a part of.
    """
    tops = {name.partition(".")[0] for name in wanted}
    first = next(iter(taken.names.values()))
    parent, _, place = taken.root.rpartition(".")
    # an entry of a list in the file has a number as well, and is its own holder
    around = f"{parent}." if parent else ""
    in_sequence = place.isdecimal() and content.holders[first] != taken.root
    found = []
    for name in names:
        inside = name if not taken.root else name.removeprefix(f"{taken.root}.")
        if taken.root and inside == name:
            beside = name.removeprefix(around).partition(".")[0]
            if in_sequence and name.startswith(around) and beside.isdecimal():
                found.append(name)
            continue
        top = inside.partition(".")[0]
        same = content.holders[name] == content.holders[first]
        if top in tops or (same and not ASIDE.search(top) and not is_average(top)):
            found.append(name)
    return found


def _tree(names: Mapping[str, Tensor]) -> _Node:
    tree = _Node()
    for name in names:
        if name.count(".") < DEEPEST_NAME:
            tree.add(name)
    return tree


def _place(
    net: _Node, file: _Node, path: str, names: dict[str, str], wrappers: list[str], depth: int = 0
) -> None:
    """Pair the tensors below two nodes by name, stepping over wrappers in the file."""
    if net.name is not None and file.name is not None:
        names[net.name] = file.name
    for key, child in net.children.items():
        if key in file.children:
            _place(child, file.children[key], f"{path}.{key}" if path else key, names, wrappers)
    wanted = net.children.keys() - file.children.keys()
    if not wanted or depth == DEEPEST_WRAPPER:
        return
    best = _wrapper(net, file, wanted)
    if best is not None:
        rest = _Node({key: net.children[key] for key in net.children if key in wanted})
        inside = f"{path}.{best}" if path else best
        wrappers.append(inside)
        _place(rest, file.children[best], inside, names, wrappers, depth + 1)


def _wrapper(net: _Node, file: _Node, wanted: set[str]) -> str | None:
    """Return the one child of the file's node that has what the network's misses."""
    counts = {
        key: len(wanted & _reach(node, DEEPEST_WRAPPER))
        for key, node in file.children.items()
        if key not in net.children
    }
    most = max(counts.values(), default=0)
    found = [key for key, count in counts.items() if count == most]
    return found[0] if most and len(found) == 1 else None


def _reach(node: _Node, depth: int) -> set[str]:
    """Return the names of children here, or further down where there is a single child."""
    found = set(node.children)
    while len(node.children) == 1 and depth:
        node, depth = next(iter(node.children.values())), depth - 1
        found |= set(node.children)
    return found


def _outermost(sets: list[WeightSet]) -> list[WeightSet]:
    """Return the sets, each with tensors of its own."""
    found: list[WeightSet] = []
    for one in sets:
        names = set(one.names.values())
        if not any(names & set(other.names.values()) for other in found):
            found.append(one)
    return found


def _words(one: WeightSet) -> set[str]:
    return set(re.findall(r"[a-z]+", one.root.lower()))


def _cosine(content: Content, one: WeightSet, two: WeightSet) -> float | None:
    """Return the cosine between two sets' weights, None where their shapes differ."""
    sums = torch.zeros(3, dtype=torch.float64)
    for name, mine in one.names.items():
        a, b = content.tensors[mine], content.tensors[two.names.get(name, mine)]
        if a.shape != b.shape:
            return None
        if a.is_floating_point() and a.ndim > 1:
            a, b = a.double().flatten(), b.double().flatten()
            sums += torch.stack([a @ b, a @ a, b @ b])
    product, first, second = sums.tolist()
    return float(product / max(math.sqrt(first * second), 1e-30))


def _notes(
    content: Content, taken: WeightSet, others: Sequence[WeightSet], why: Mapping[str, str]
) -> tuple[str, ...]:
    differing = [o for o in others if not _equal(content, taken, o)]
    if not differing:
        return ()
    count = {2: "two", 3: "three", 4: "four"}.get(len(differing) + 1, str(len(differing) + 1))
    listed = " and ".join(o.title for o in differing[:4])
    reason = why.get(taken.root)
    if reason is None and any("current" in _words(o) for o in differing):
        reason = "the moving average"  # of Lightning, which calls the other one current
    if reason is None and any(_is_unaveraged(o.root) for o in differing):
        reason = "as its neighbour is said to be no average,"
    if reason is None and any(_words(o) & SLOW for o in differing):
        reason = "what has learned from the others,"
    verb = "is" if len(differing) == 1 else "are"
    if reason is None:
        reason = "what comes first in the file,"
    return (
        f"the file holds {count} sets of weights; {reason} {taken.title} is taken, and {listed} "
        f"{verb} not",
    )


def _equal(content: Content, one: WeightSet, two: WeightSet) -> bool:
    return all(
        torch.equal(content.tensors[name], content.tensors[two.names[key]])
        for key, name in one.names.items()
        if key in two.names
    )
