"""The figure of a matrix: every arm of every block, with intervals, beside the dense model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.criteria.protocol import percent
from benchmarks.matrix.cells import Cell
from benchmarks.matrix.levels import CAPACITY, DENSE, EVEN, OURS, PAPER
from benchmarks.matrix.summary import Block, arms_of, blocks_of, mean
from robust_prune.statistics import Proportion

COLUMNS = 3
MINE = {OURS: "C0", CAPACITY: "C2", EVEN: "C9", PAPER: "C4"}
THEIRS, MARKS = "C1", {"pgd": ("o", "PGD-20"), "autoattack": ("D", "AutoAttack")}


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Write a picture with a panel for each block; arms by PGD-20, the dense model as lines."""
    from matplotlib.figure import Figure

    good = [c for c in cells if not c.error]
    blocks = blocks_of(good)
    if not blocks:
        return
    rows = math.ceil(len(blocks) / COLUMNS)
    columns = min(COLUMNS, len(blocks))
    figure = Figure(figsize=(4.8 * columns, 3.0 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, block in zip(panels, blocks, strict=False):
        _panel(axes, block, good)
    for axes in panels[len(blocks) :]:
        axes.set_axis_off()
    for attack, (mark, name) in MARKS.items():
        style = {"linestyle": "--" if attack == "pgd" else ":", "color": "0.4"}
        fill = "0.4" if attack == "pgd" else "white"
        label = f"{name} (line: the dense model)"
        panels[0].plot([], [], mark, markerfacecolor=fill, label=label, **style)
    figure.legend(fontsize=7, loc="outside upper right", ncols=2)
    figure.supxlabel("accuracy on test images, %, with 95 % intervals over images", fontsize=9)
    figure.savefig(path, dpi=110)


def _panel(axes: Any, block: Block, cells: Sequence[Cell]) -> None:
    """Draw a block: its arms from below by PGD-20, and what the dense model reaches."""
    data, network, method, ratio, tuning = block
    arms = arms_of(cells, block)
    dense = arms.pop(DENSE, [])
    order = sorted(arms, key=lambda arm: mean(arms[arm], "pgd"))
    for attack in MARKS:
        _points(axes, {arm: arms[arm] for arm in order}, attack)
        if judged := [c for c in dense if getattr(c, attack)]:
            style = "--" if attack == "pgd" else ":"
            axes.axvline(mean(judged, attack), color="0.4", linestyle=style, linewidth=1)
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.set_ylim(-0.5, len(order) - 0.5)
    title = f"{data}, {network}, {method}\n{100 * ratio:g} % removed, {tuning}"
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3, axis="x")


def _points(axes: Any, arms: Mapping[str, Sequence[Cell]], attack: str) -> None:
    """Draw the mean over seeds of each arm, with its Wilson interval over test images."""
    mark, _ = MARKS[attack]
    for place, (arm, runs) in enumerate(arms.items()):
        seen = [getattr(c, attack) for c in runs if getattr(c, attack)]
        if not seen:
            continue
        centre = sum(map(percent, seen)) / len(seen)
        images = len(seen[0])  # seeds share their images: more of them make no interval narrower
        low, high = Proportion(round(centre * images / 100), images).interval
        error = [[max(centre - 100 * low, 0)], [max(100 * high - centre, 0)]]
        axes.errorbar(
            [centre],
            [place + (0.12 if attack == "pgd" else -0.12)],
            xerr=error,
            fmt=mark,
            color=MINE.get(arm, THEIRS),
            markersize=5,
            markerfacecolor=None if attack == "pgd" else "white",
        )
