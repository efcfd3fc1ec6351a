"""What a record holds: a cell for each model, and the tables made of them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from robust_prune.statistics import PairedTest


@dataclass(frozen=True)
class Cell:
    """One pruned model: PGD-20 and clean verdicts as strings of 0 and 1, one per test image."""

    network: str
    arm: str
    ratio: float
    seed: int
    pgd: str
    clean: str
    prune_seconds: float

    @property
    def key(self) -> tuple[str, str, float, int]:
        """What makes a cell the same when a run is taken up again."""
        return self.network, self.arm, self.ratio, self.seed


@dataclass(frozen=True)
class Pair:
    """Two arms on the same images: those that `data` gets right alone, and the other alone."""

    cell: Cell
    with_data: Cell

    @property
    def test(self) -> PairedTest:
        """How unevenly the images fall on which the two disagree."""
        verdicts = list(zip(self.with_data.pgd, self.cell.pgd, strict=True))
        return PairedTest(verdicts.count(("1", "0")), verdicts.count(("0", "1")))

    @property
    def lost(self) -> float:
        """Points of PGD-20 that the arm is behind."""
        test = self.test
        return 100 * (test.first_only - test.second_only) / len(self.cell.pgd)

    @property
    def at_most(self) -> float:
        """The upper end of the interval (95 %, normal) of these points."""
        test, n = self.test, len(self.cell.pgd)
        share = self.lost / 100
        variance = ((test.first_only + test.second_only) / n - share**2) / n
        return self.lost + 196 * math.sqrt(max(variance, 0.0))


def pairs(cells: list[Cell], arm: str) -> list[Pair]:
    """Return an arm's cells with those of `data` at the same share and seed."""
    data = {(c.network, c.ratio, c.seed): c for c in cells if c.arm == "data"}
    ranked = sorted(cells, key=lambda c: (c.network, c.ratio, c.seed))
    found = [(c, data.get((c.network, c.ratio, c.seed))) for c in ranked if c.arm == arm]
    return [Pair(cell, other) for cell, other in found if other is not None]


def points(cells: list[Cell], *, beyond_half: bool) -> int:
    """Return how many points stand-ins may cost: the most that a cell lost, rounded up."""
    found = [p.lost for p in pairs(cells, "stand-ins") if (p.cell.ratio > 0.5) == beyond_half]
    return math.ceil(max(found, default=0.0))


def short_table(cells: list[Cell]) -> str:
    """Return PGD-20 with data and without, as the pages show it: means of the seeds of both."""
    lines = [
        "| network | removed | with data | without data | lost, with 95 % interval | seeds |",
        "|---|---|---|---|---|---|",
    ]
    found = pairs(cells, "stand-ins")
    for network, ratio in dict.fromkeys((p.cell.network, p.cell.ratio) for p in found):
        own = [p for p in found if (p.cell.network, p.cell.ratio) == (network, ratio)]
        means = [
            statistics.mean(100 * c.pgd.count("1") / len(c.pgd) for c in arm)
            for arm in ([p.with_data for p in own], [p.cell for p in own])
        ]
        lost, half = _lost(own)
        lines.append(
            f"| {network} | {100 * ratio:.0f} % | {means[0]:.1f} | {means[1]:.1f} "
            f"| {lost:.1f} [{lost - half:.1f}, {lost + half:.1f}] | {len(own)} |"
        )
    return "\n".join(lines) + "\n"


def _lost(own: list[Pair]) -> tuple[float, float]:
    """Return the points lost in the mean of the seeds, and half of their interval (95 %, normal).

    The seeds share their images: what varies is each image's mean over the seeds.
    """
    by_image = [
        statistics.mean(int(w) - int(o) for w, o in zip(with_data, without, strict=True))
        for with_data, without in zip(
            zip(*(p.with_data.pgd for p in own), strict=True),
            zip(*(p.cell.pgd for p in own), strict=True),
            strict=True,
        )
    ]
    return 100 * statistics.mean(by_image), 196 * statistics.stdev(by_image) / len(by_image) ** 0.5


def paired_table(cells: list[Cell]) -> str:
    """Return what stand-ins and unlabelled images lose against labelled ones, cell by cell."""
    lines = [
        "| network | removed | arm | seed | points lost (at most, 95 %) | right with data alone / "
        "without alone | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in ("stand-ins", "unlabelled"):
        for pair in pairs(cells, arm):
            cell, test = pair.cell, pair.test
            lines.append(
                f"| {cell.network} | {100 * cell.ratio:.0f} % | {arm} | {cell.seed} "
                f"| {pair.lost:.1f} ({pair.at_most:.1f}) "
                f"| {test.first_only} / {test.second_only} | {test.p_value:.2g} |"
            )
    return "\n".join(lines) + "\n"


def read(path: Path) -> Iterator[Cell]:
    """Yield the cells of a record."""
    if path.exists():
        yield from (Cell(**json.loads(line)) for line in path.read_text().splitlines())


def table(cells: list[Cell]) -> str:
    """Return PGD-20 and clean accuracy by network, share removed and arm, in percent."""
    lines = [
        "| network | removed | arm | PGD-20, mean (seeds) | clean | n |",
        "|---|---|---|---|---|---|",
    ]
    ranked = sorted(cells, key=lambda c: (c.network, c.ratio, c.arm, c.seed))
    for network, ratio, arm in dict.fromkeys((c.network, c.ratio, c.arm) for c in ranked):
        found = [c for c in ranked if (c.network, c.ratio, c.arm) == (network, ratio, arm)]
        robust = [100 * c.pgd.count("1") / len(c.pgd) for c in found]
        clean = [100 * c.clean.count("1") / len(c.clean) for c in found]
        seeds = ", ".join(f"{value:.1f}" for value in robust)
        lines.append(
            f"| {network} | {100 * ratio:.0f} % | {arm} | {statistics.mean(robust):.1f} ({seeds}) "
            f"| {statistics.mean(clean):.1f} | {len(found[0].pgd)} |"
        )
    return "\n".join(lines) + "\n"
