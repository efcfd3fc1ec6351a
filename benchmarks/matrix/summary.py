"""From cells to tables, and the comparisons that the project has set itself, corrected by Holm."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.criteria.protocol import percent
from benchmarks.criteria.summary import interval_of, p_of, p_value
from benchmarks.matrix.cells import Cell
from benchmarks.matrix.levels import CAPACITY, DENSE, LITTLE, LONG, OURS, UNTUNED, Key

ATTACKS = ("clean", "pgd", "autoattack")
GOALS = {UNTUNED: 5.0, LITTLE: 3.0, LONG: 1.5}  # points over torch-pruning's best arm
Block = tuple[str, str, str, float, str]  # data, network, method, share, tuning


@dataclass(frozen=True)
class Comparison:
    """Ours against torch-pruning's best arm in one block, over the seeds that both have."""

    block: Block
    ours: str
    theirs: str
    attack: str
    gain: float
    p: float
    seeds: int
    images: int


def tables(cells: Sequence[Cell]) -> str:
    """Return Markdown: one table a block, arms by robust accuracy, and all comparisons."""
    good = [c for c in cells if not c.error]
    parts = [_table(block, good) for block in blocks_of(good)]
    failed = [f"- {c.key.label}: {c.error}" for c in cells if c.error]
    if failed:
        parts.append("\n".join(("### Arms that gave no model", "", *failed)))
    return "\n\n".join((*parts, compared(good))) + "\n"


def compared(cells: Sequence[Cell]) -> str:
    """Return a table of our arms against torch-pruning's best, with p values after Holm."""
    lines = [
        "### Against torch-pruning's best arm on the same graph, with the same fine-tuning",
        "",
        "| data, network, method | removed | tuning | ours | theirs | attack (images) | seeds "
        "| points | p | p, Holm |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    found = comparisons(cells, OURS, CAPACITY)
    for item, corrected in zip(found, holm([c.p for c in found]), strict=True):
        data, network, method, ratio, tuning = item.block
        reached = " **" if item.gain >= GOALS.get(tuning, math.inf) and corrected < 0.01 else " "
        lines.append(
            f"| {data}, {network}, {method} | {100 * ratio:g} % | {tuning} | {item.ours} "
            f"| {item.theirs} | {item.attack} ({item.images}) | {item.seeds} "
            f"|{reached}{item.gain:+.1f}{reached.strip()} | {p_value(item.p)} "
            f"| {p_value(corrected)} |"
        )
    goals = ", ".join(f"{name} {points:g}" for name, points in GOALS.items())
    return "\n".join((*lines, "", f"Bold: the goal ({goals} points) is met, p after Holm < 0.01."))


def comparisons(cells: Sequence[Cell], *arms_of_ours: str) -> list[Comparison]:
    """Return our arms against torch-pruning's best, block by block, by the hardest attack there.

    That is AutoAttack where it has judged any of our models: then those seeds count, and no other.
    """
    found = []
    for ours, block in itertools.product(arms_of_ours, blocks_of(cells)):
        arms = arms_of(cells, block)
        if ours not in arms:
            continue
        attack = "autoattack" if any(c.autoattack for c in arms[ours]) else "pgd"
        by_arm = {a: [c for c in runs if getattr(c, attack)] for a, runs in arms.items()}
        measured = {a: runs for a, runs in by_arm.items() if runs and a.startswith("tp-")}
        if not measured:
            continue
        best = max(measured, key=lambda arm: mean(measured[arm], attack))
        differences = paired(by_arm[ours], measured[best], attack)
        if differences:
            gain = 100 * statistics.mean(statistics.mean(d) for d in differences)
            n = len(differences[0])
            p = p_of(differences)
            found.append(Comparison(block, ours, best, attack, gain, p, len(differences), n))
    return found


def claims(cells: Sequence[Cell], least_p: float) -> list[Cell]:
    """Return the models that a claim would rest on: our better arm's, the best peer's, the dense.

    Where the first two differ by PGD with p of `least_p` or less; all seeds, each model once.
    """
    good = [c for c in cells if not c.error]
    by_pgd = [replace(c, autoattack="") for c in good]
    found: dict[Key, Cell] = {}
    for block in blocks_of(good):
        here = [c for c in comparisons(by_pgd, OURS, CAPACITY) if c.block == block]
        best = max(here, key=lambda c: c.gain, default=None)
        if best is not None and best.p <= least_p:
            arms = arms_of(good, block)
            for arm in (best.ours, best.theirs, DENSE):
                found |= {cell.key: cell for cell in arms.get(arm, [])}
    return list(found.values())


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for how many there are (Holm, 1979), in the order given."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected, least = [0.0] * len(values), 0.0
    for place, i in enumerate(order):
        least = max(least, min(1.0, (len(values) - place) * values[i]))
        corrected[i] = least
    return corrected


def paired(ours: Sequence[Cell], theirs: Sequence[Cell], attack: str) -> list[tuple[int, ...]]:
    """Return by seed that both have the difference of verdicts, image by image."""
    others = {c.key.seed: getattr(c, attack) for c in theirs}
    return [
        tuple(int(a) - int(b) for a, b in zip(mine, other, strict=True))
        for cell in ours
        if (mine := getattr(cell, attack))
        and len(mine) == len(other := others.get(cell.key.seed, ""))
    ]


def mean(cells: Iterable[Cell], attack: str) -> float:
    """Return the mean accuracy over seeds, in percent."""
    return statistics.mean(percent(getattr(c, attack)) for c in cells)


def _table(block: Block, cells: Sequence[Cell]) -> str:
    data, network, method, ratio, tuning = block
    arms = arms_of(cells, block)
    threat = next(iter(arms.values()))[0].threat
    lines = [
        f"### {data}, {network}, {method}, {100 * ratio:g} % removed, {tuning} ({threat})",
        "",
        "| arm | seeds | MACs (M) | parameters | log-capacity | clean % | PGD-20 % "
        "| AutoAttack % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in sorted(arms, key=lambda arm: -mean(arms[arm], "pgd")):
        runs = arms[arm]
        found = (interval_of([getattr(c, attack) for c in runs]) for attack in ATTACKS)
        lines.append(
            f"| {arm} | {len(runs)} | {statistics.mean(c.macs for c in runs) / 1e6:.2f} "
            f"| {statistics.mean(c.params for c in runs):,.0f} "
            f"| {statistics.mean(c.log_capacity for c in runs):.1f} "
            f"| {' | '.join(found)} |"
        )
    return "\n".join(lines)


def blocks_of(cells: Sequence[Cell]) -> list[Block]:
    """Return the blocks that have a pruned model."""
    keys = (c.key for c in cells if c.key.arm != DENSE)
    found = {(k.data, k.network, k.method, k.ratio, k.tuning) for k in keys}
    return sorted(found)


def arms_of(cells: Sequence[Cell], block: Block) -> dict[str, list[Cell]]:
    """Return the cells of a block by arm, with the dense model's of the same fine-tuning."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        key = cell.key
        ratio = block[3] if key.arm == DENSE else key.ratio
        if (key.data, key.network, key.method, ratio, key.tuning) == block:
            found.setdefault(key.arm, []).append(cell)
    return found
