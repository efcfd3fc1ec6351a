"""Shapes on disk, and the page and figure that are made of them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.criteria.protocol import percent
from benchmarks.criteria.summary import interval_of, p_of, p_value
from benchmarks.matrix.levels import DENSE
from benchmarks.shapes.predicting import Predictor, left_out, predictors

RULES = ("capacity", "even", "curve", "blend", "mrs", "inverted")
CAPACITY = "log-capacity (sum of log parameters of layers)"
LOSS = "un-tuned adversarial loss"


@dataclass(frozen=True)
class Shape:
    """One shape, before and after fine-tuning. Verdicts are strings of 0 and 1, one per image.

    Attributes:
        widths: channels by group.
        layers: weights by layer.
        loss: adversarial, of 512 validation images under PGD-10 before fine-tuning, in nats.
        before: PGD-20 on validation images, before fine-tuning.
        validation: the same after it.
        clean: on test images, after fine-tuning.
        pgd: PGD-20 on test images, after fine-tuning.
    """

    name: str
    seed: int
    widths: Mapping[str, int]
    layers: Mapping[str, int]
    macs: int
    params: int
    log_capacity: float
    loss: float
    before: str
    validation: str
    clean: str
    pgd: str
    best_epoch: int
    notes: Sequence[str] = ()

    @property
    def told(self) -> str:
        """One line for people."""
        return (
            f"{self.macs / 1e6:.2f} M, {self.params:,} parameters, validation "
            f"{percent(self.before):.1f} -> {percent(self.validation):.1f}, "
            f"test clean {percent(self.clean):.1f} PGD-20 {percent(self.pgd):.1f}"
        )


def read(record: Path) -> list[Shape]:
    """Return what a record holds so far, by name."""
    paths = sorted((record / "shapes").glob("*.json"))
    return [Shape(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def page(found: Sequence[Shape], out: Path) -> str:
    """Return Markdown: all shapes, and what told how robust they would be; draw the figure."""
    by_name: dict[str, list[Shape]] = {}
    for shape in found:
        by_name.setdefault(shape.name, []).append(shape)
    order = sorted(by_name, key=lambda name: -_mean(by_name[name], "pgd"))
    base = by_name.get("capacity", [])
    lines = [
        "| shape | seeds | MACs (M) | parameters | log-capacity | un-tuned loss "
        "| validation PGD-20 % | test clean % | test PGD-20 % | minus capacity | p |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(_row(name, by_name[name], base) for name in order),
    ]
    pruned = {name: runs for name, runs in by_name.items() if name != DENSE}
    if len(pruned) < 5:
        return "\n".join(lines) + "\n"
    _draw(pruned, out / "predictors.png")
    lines += ["", *_told(pruned)]
    return "\n".join(lines) + "\n"


def _row(name: str, runs: Sequence[Shape], base: Sequence[Shape]) -> str:
    first = runs[0]
    others = {shape.seed: shape for shape in base}
    pairs = [
        tuple(int(a) - int(b) for a, b in zip(s.pgd, others[s.seed].pgd, strict=True))
        for s in runs
        if s.seed in others and name != "capacity"
    ]
    gain = f"{100 * statistics.mean(map(statistics.mean, pairs)):+.1f}" if pairs else ""
    chance = p_value(p_of(pairs)) if pairs else ""
    return (
        f"| {name} | {len(runs)} | {first.macs / 1e6:.2f} | {first.params:,} "
        f"| {first.log_capacity:.1f} | {statistics.mean(s.loss for s in runs):.3f} "
        f"| {_mean(runs, 'validation'):.1f} | {interval_of([s.clean for s in runs])} "
        f"| {interval_of([s.pgd for s in runs])} | {gain} | {chance} |"
    )


def known(shapes: Mapping[str, Sequence[Shape]]) -> dict[str, list[float]]:
    """Return by predictor what is known of each shape before it is tuned."""
    first = [runs[0] for runs in shapes.values()]
    return {
        "parameters": [float(s.params) for s in first],
        "log of parameters": [math.log(s.params) for s in first],
        CAPACITY: [s.log_capacity for s in first],
        "sum of log widths of groups": [sum(map(math.log, s.widths.values())) for s in first],
        "narrowest group, share of channels": _narrowest(first),
        LOSS: [-statistics.mean(s.loss for s in runs) for runs in shapes.values()],
    }


def _told(pruned: Mapping[str, Sequence[Shape]]) -> list[str]:
    tuned = [_mean(runs, "validation") + _mean(runs, "pgd") for runs in pruned.values()]
    tuned = [value / 2 for value in tuned]
    numbers = known(pruned)
    rows = predictors(numbers, tuned)
    pair = np.array([numbers[LOSS], numbers[CAPACITY]]).T
    both = left_out(pair, np.asarray(tuned))
    logs = np.array([[math.log(w) for w in runs[0].widths.values()] for runs in pruned.values()])
    fitted = left_out(logs, np.asarray(tuned), ridge=0.1)
    return [
        f"What is known before fine-tuning against PGD-20 after it ({len(pruned)} shapes, mean of "
        "validation and test):",
        "",
        "| known before | Spearman | p | R^2, each left out |",
        "|---|---|---|---|",
        *(_predictor(row) for row in rows),
        f"| un-tuned loss and log-capacity together | | | {both:.2f} |",
        f"| log widths of all groups, one slope each | | | {fitted:.2f} |",
        "",
        "![What is known before fine-tuning against PGD-20 after it](predictors.png)",
    ]


def _predictor(row: Predictor) -> str:
    return f"| {row.name} | {row.spearman:+.2f} | {p_value(row.p)} | {row.determination:.2f} |"


def _narrowest(shapes: Sequence[Shape]) -> list[float]:
    widest = {name: max(s.widths[name] for s in shapes) for name in shapes[0].widths}
    return [min(s.widths[name] / widest[name] for name in widest) for s in shapes]


def _mean(runs: Sequence[Shape], what: str) -> float:
    return statistics.mean(percent(getattr(shape, what)) for shape in runs)


def _draw(pruned: Mapping[str, Sequence[Shape]], path: Path) -> None:
    """Draw three predictors against the tuned accuracy."""
    from matplotlib.figure import Figure

    all_known = known(pruned)
    shown = [CAPACITY, "parameters", LOSS]
    tuned = [_mean(runs, "pgd") for runs in pruned.values()]
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3, sharey=True), shown, strict=True):
        sign = -1 if name == LOSS else 1
        for family in (*RULES, "random"):
            mine = [i for i, shape in enumerate(pruned) if shape.startswith(family)]
            x, y = [sign * all_known[name][i] for i in mine], [tuned[i] for i in mine]
            axes.scatter(x, y, label=family, s=36 if family != "random" else 18)
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("PGD-20 after fine-tuning, test images, %")
    figure.axes[1].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
