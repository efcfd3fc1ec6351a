"""From cells to tables."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from benchmarks.criteria.protocol import BEST
from benchmarks.criteria.summary import (
    accuracy,
    by_arm,
    compare,
    on_common_seeds,
    p_value,
    spread,
)
from benchmarks.finetuning.protocol import (
    FINAL,
    METHODS,
    PEER,
    REACH,
    Tuned,
    chosen,
    textbook_of,
)
from benchmarks.finetuning.recipes import BASELINE, TEXTBOOK

COLUMNS = (
    "MACs (M)",
    "parameters",
    "epochs (best)",
    "seconds: plan + tuning",
    "validation PGD-10 %",
    "clean %",
    "PGD-20 %",
)


def tables(cells: Sequence[Tuned]) -> str:
    """Return Markdown: a table for each stage, and the comparisons of the last one."""
    parts = []
    if any(c.stage == METHODS for c in cells):
        parts.append(_methods([c for c in cells if c.stage == METHODS]))
    if any(c.stage == FINAL for c in cells):
        parts.append(_final([c for c in cells if c.stage == FINAL], chosen(cells)))
    if any(c.stage == REACH for c in cells):
        parts.append(_reach(cells))
    return "\n\n".join(parts) + "\n"


def _methods(cells: Sequence[Tuned]) -> str:
    arms = by_arm(cells)
    base = arms.get(f"{BEST}/{BASELINE}", [])
    best = f"{BEST}/{chosen(cells)}"
    lines = _head("Stage `methods`", ("p against pgd-at: validation", "test"))
    order = sorted(arms, key=lambda arm: -accuracy(arms[arm], "validation"))
    for arm in order:
        same = arm == f"{BEST}/{BASELINE}" or not base
        ps = ["" if same else p_value(compare(arms[arm], base, a)) for a in ("validation", "pgd")]
        lines.append(_row(f"**{arm}** (chosen)" if arm == best else arm, arms[arm], ps))
    return "\n".join(lines)


def _final(cells: Sequence[Tuned], best: str) -> str:
    arms = by_arm(cells)
    n = max((len(c.autoattack) for c in cells), default=0)
    ours = f"{BEST}/{best}" if f"{BEST}/{best}" in arms else f"{BEST}/{BASELINE}"
    column = f"AutoAttack %, {n} images"
    lines = _head("Stage `final`", (column, f"p against {ours}: PGD-20", "AutoAttack"))
    for arm in sorted(arms, key=lambda arm: -accuracy(arms[arm], "pgd")):
        runs = arms[arm]
        ps = [
            "" if arm == ours or ours not in arms else p_value(compare(runs, arms[ours], attack))
            for attack in ("pgd", "autoattack")
        ]
        if not all(c.autoattack for c in runs):
            ps[1] = ""
        lines.append(_row(arm, runs, [spread(runs, "autoattack"), *ps]))
    pairs = (
        (ours, f"{PEER}/{best}"),
        (ours, f"{PEER}/{textbook_of(ours.split('/')[1])}"),
        (ours, f"{PEER}/{TEXTBOOK}"),
        (f"{BEST}/{BASELINE}", f"{PEER}/{BASELINE}"),
        (f"{BEST}/{BASELINE}", f"{PEER}/{TEXTBOOK}"),
        (ours, f"dense/{best}"),
        (ours, f"dense/{BASELINE}"),
        (ours, f"{BEST}/{BASELINE}"),
    )
    lines.append("")
    for one, other in dict.fromkeys(pairs):
        if one == other or one not in arms or other not in arms:
            continue
        lines.append(f"- {one} against {other}: {_difference(arms[one], arms[other])}")
    return "\n".join(lines)


def _reach(cells: Sequence[Tuned]) -> str:
    """Return how robust accuracy falls with the share removed, and where it is a point lower."""
    found: dict[tuple[str, float], list[Tuned]] = {}
    names = sorted(
        {
            c.arm
            for c in cells
            if (c.stage == REACH or (c.stage == FINAL and c.arm.endswith(f"/{BASELINE}")))
            and not c.arm.startswith("dense/")
        }
    )
    for cell in sorted(cells, key=lambda c: (c.ratio, c.arm)):
        if cell.stage in (FINAL, REACH) and (cell.arm in names or cell.arm.startswith("dense/")):
            found.setdefault((cell.arm, cell.ratio), []).append(cell)
    lines = _head(f"Stage `{REACH}`", ())
    for (arm, ratio), runs in found.items():
        label = arm if arm.startswith("dense/") else f"{arm} -{100 * ratio:g} %"
        lines.append(_row(label, runs, ()))
    lines.append("")
    dense = [accuracy(runs, "pgd") for (arm, _), runs in found.items() if arm.startswith("dense/")]
    for name in names:
        points = [(r, accuracy(runs, "pgd")) for (arm, r), runs in found.items() if arm == name]
        for level in dense if points else ():
            lines.append(f"- {name}: {_crossing(points, level - 1)} (dense {level:.1f})")
    return "\n".join(lines)


def _crossing(points: Sequence[tuple[float, float]], level: float) -> str:
    """Say what share can go until accuracy falls below the level, straight between ratios."""
    if points[0][1] < level:
        return f"below {level:.1f} % already at -{100 * points[0][0]:g} %"
    for (low, above), (high, below) in itertools.pairwise(points):
        if below < level:
            share = low + (high - low) * (above - level) / (above - below)
            return f"falls below {level:.1f} % at -{100 * share:.1f} %"
    return f"still above {level:.1f} % at -{100 * points[-1][0]:g} %"


def _difference(ours: Sequence[Tuned], theirs: Sequence[Tuned]) -> str:
    """Return the gain in points over the seeds that both have, attack by attack."""
    ours, theirs = on_common_seeds(ours, theirs)
    told = []
    for attack, name in (("clean", "clean"), ("pgd", "PGD-20"), ("autoattack", "AutoAttack")):
        measured = ([c for c in runs if getattr(c, attack)] for runs in (ours, theirs))
        mine, others = on_common_seeds(*measured)
        if not mine:
            continue
        gain = accuracy(mine, attack) - accuracy(others, attack)
        some = f" (seeds {_seeds(mine)})" if len(mine) < len(ours) else ""
        told.append(f"{name} {gain:+.1f} points, {p_value(compare(mine, others, attack))}{some}")
    return f"{'; '.join(told)} (seeds {_seeds(ours)})"


def _seeds(runs: Sequence[Tuned]) -> str:
    return ", ".join(str(c.seed) for c in runs)


def _head(title: str, more: Sequence[str]) -> list[str]:
    columns = ("arm", "seeds", *COLUMNS, *more)
    return [
        f"### {title}",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]


def _row(label: str, runs: Sequence[Tuned], more: Sequence[str]) -> str:
    epochs = ", ".join(f"{c.epochs} ({c.best_epoch})" for c in runs)
    plan = statistics.mean(c.plan_cpu_seconds for c in runs)
    tuning = statistics.mean(c.tune_cpu_seconds for c in runs)
    fields = (
        label,
        str(len(runs)),
        f"{statistics.mean(c.macs for c in runs) / 1e6:.2f}",
        f"{statistics.mean(c.params for c in runs):,.0f}",
        epochs,
        f"{plan:.0f} + {tuning:.0f}",
        spread(runs, "validation"),
        spread(runs, "clean"),
        spread(runs, "pgd"),
        *more,
    )
    return f"| {' | '.join(fields)} |"
