"""From cells to tables, paired tests, the targets, and the plot."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.criteria.protocol import ARMS, BEST, WITHOUT_FIT, Cell, percent
from robust_prune.statistics import PairedTest, Proportion

# Student's t, two-sided, by number of seeds
T_95 = dict(enumerate((12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26), 2))
Attack = str
C = TypeVar("C", bound=Cell)


def tables(cells: Sequence[Cell]) -> str:
    """Return Markdown: one table for each network, stage and ratio, arms by robust accuracy."""
    parts = []
    for network in dict.fromkeys(c.network for c in cells):
        for stage in dict.fromkeys(c.stage for c in cells if c.network == network):
            mine = [c for c in cells if c.network == network and c.stage == stage]
            for ratio in sorted({c.ratio for c in mine if c.ratio}):
                parts.append(_table(network, stage, ratio, mine, _dense(network, stage, cells)))
    return "\n\n".join(parts) + "\n"


def _table(
    network: str, stage: str, ratio: float, cells: Sequence[Cell], dense: Sequence[Cell]
) -> str:
    here = by_arm([c for c in cells if c.ratio == ratio])
    attack = "autoattack" if any(c.autoattack for c in cells) else "pgd"
    best = best_peer(here, "pgd")
    lines = [
        f"### {network}, {stage}, {100 * ratio:.0f} % of the multiply-adds removed",
        "",
        "| arm | seeds | MACs (M) | parameters | clean % | PGD-20 % | AutoAttack % | p (PGD-20) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ranked = sorted(here.items(), key=lambda item: -accuracy(item[1], "pgd"))
    for arm, runs in [*([("dense", dense)] if dense else []), *ranked]:
        if all(c.error for c in runs):
            lines.append(f"| {arm} | {len(runs)} | {runs[0].error[:80]} | | | | | |")
            continue
        good = [c for c in runs if not c.error]
        p = "" if best in ("", arm) or arm == "dense" else p_value(compare(good, here[best], "pgd"))
        lines.append(
            f"| {arm}{' (best peer)' if arm == best else ''} | {len(good)} | "
            f"{statistics.mean(c.macs for c in good) / 1e6:.2f} | "
            f"{statistics.mean(c.params for c in good):,.0f} | {spread(good, 'clean')} | "
            f"{spread(good, 'pgd')} | "
            f"{spread(good, 'autoattack') if attack == 'autoattack' else ''} | {p} |"
        )
    return "\n".join(lines)


def targets(cells: Sequence[Cell], ours: str = BEST) -> str:
    """Return one line for each comparison that the project has set itself."""
    lines = []
    for stage, least, attack in (
        ("untuned", 5.0, "pgd"),
        ("little", 3.0, "pgd"),
        ("full", 1.5, "autoattack"),
    ):
        gains: list[float] = []
        pooled: list[tuple[int, ...]] = []
        for network in dict.fromkeys(c.network for c in cells):
            done = [c for c in cells if c.network == network and c.stage == stage and not c.error]
            dense = _dense(network, stage, cells)
            for ratio in sorted({c.ratio for c in done if c.ratio}):
                here = by_arm([c for c in done if c.ratio == ratio])
                best = best_peer(here, attack)
                if ours not in here or not best:
                    continue
                mine, theirs = on_common_seeds(here[ours], here[best])
                we, they = accuracy(mine, attack), accuracy(theirs, attack)
                pooled += paired(mine, theirs, attack)
                gains.append(we - they)
                top = accuracy(dense, attack)
                lines.append(
                    f"- {stage}, {network}, -{100 * ratio:.0f} %: {ours} {we:.1f} against {best} "
                    f"{they:.1f} ({attack}, dense {top:.1f}): {we - they:+.1f} points, "
                    f"{p_value(compare(mine, theirs, attack))}; parameters {params(mine)} against "
                    f"{params(theirs)} (seeds {', '.join(str(c.seed) for c in mine)})"
                )
        if gains:
            lines.append(
                f"- **{stage}: {statistics.mean(gains):+.1f} points on average over {len(gains)} "
                f"cells** (target {least:g}), over images {p_value(clustered(pooled))}"
            )
    return "\n".join(lines) + "\n"


def _dense(network: str, stage: str, cells: Sequence[Cell]) -> Sequence[Cell]:
    """Return the dense model's cell of a stage, or else the one on most images, not tuned."""
    mine = [c for c in cells if c.network == network and c.arm == "dense"]
    same = [c for c in mine if c.stage == stage]
    return same or sorted(mine, key=lambda c: len(c.pgd))[-1:]


def best_peer(by_arm: Mapping[str, Sequence[Cell]], attack: Attack) -> str:
    """Return torch-pruning's best arm, by the mean over its seeds."""
    peers = [a for a, runs in by_arm.items() if a.startswith("tp-") and not runs[0].error]
    return max(peers, key=lambda a: accuracy(by_arm[a], attack), default="")


def on_common_seeds(ours: Sequence[C], theirs: Sequence[C]) -> tuple[Sequence[C], Sequence[C]]:
    """Return the runs of both whose seed the other has too."""
    seeds = {c.seed for c in ours} & {c.seed for c in theirs}
    return [c for c in ours if c.seed in seeds], [c for c in theirs if c.seed in seeds]


def compare(ours: Sequence[Cell], theirs: Sequence[Cell], attack: Attack) -> float:
    """Return the two-sided p-value that both are right on equally many images.

    One pair of runs: the exact McNemar test. Several (seeds, ratios): runs share their test
    images, so that their pairs are not independent; images are. The sum over runs of an image's
    differences is one observation, and the mean of those is tested against 0 by the normal
    approximation.
    """
    return p_of(paired(ours, theirs, attack))


def p_of(differences: Sequence[Sequence[int]]) -> float:
    """Return the p-value of one run (exact McNemar), or of several whose images are the same."""
    if len(differences) == 1:
        (only,) = differences
        return PairedTest(sum(d > 0 for d in only), sum(d < 0 for d in only)).p_value
    return clustered(differences)


def paired(ours: Sequence[Cell], theirs: Sequence[Cell], attack: Attack) -> list[tuple[int, ...]]:
    """Return for each seed that both have the difference of verdicts, image by image."""
    others = {c.seed: getattr(c, attack) for c in theirs}
    return [
        tuple(int(a) - int(b) for a, b in zip(mine, other, strict=True))
        for cell in ours
        if (mine := getattr(cell, attack)) and len(mine) == len(other := others.get(cell.seed, ""))
    ]


def clustered(differences: Sequence[Sequence[int]]) -> float:
    """Return the p-value of runs [runs, images] whose images are the same, NaN without images."""
    sums = [sum(image) for image in zip(*differences, strict=True)]
    if len(sums) < 2:
        return math.nan
    if not any(sums):
        return 1.0
    error = statistics.stdev(sums) / math.sqrt(len(sums))
    if error == 0:
        return 0.0
    return 2 * (1 - statistics.NormalDist().cdf(abs(statistics.mean(sums)) / error))


def accuracy(runs: Sequence[Cell], attack: Attack) -> float:
    """Return the mean accuracy over seeds, in percent."""
    values = [percent(getattr(c, attack)) for c in runs if not c.error and getattr(c, attack)]
    return statistics.mean(values) if values else math.nan


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Draw robust accuracy before fine-tuning against multiply-adds, every arm, by network."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    screen = [c for c in cells if c.stage == "screen" and not c.error]
    networks = list(dict.fromkeys(c.network for c in screen))
    figure, all_axes = plt.subplots(
        1, len(networks), figsize=(5.2 * len(networks) + 2.4, 4.6), squeeze=False
    )
    for axes, network in zip(all_axes[0], networks, strict=True):
        _draw(axes, [c for c in screen if c.network == network])
        axes.set_title(network)
    all_axes[0][0].set_ylabel("PGD-20 accuracy before fine-tuning (%)")
    known = {
        label: handle
        for axes in all_axes[0]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(known.values()), list(known), loc="center right", fontsize=7)
    figure.tight_layout(rect=(0, 0, 1 - 2.2 / figure.get_figwidth(), 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(axes: Any, cells: Sequence[Cell]) -> None:
    import matplotlib as mpl

    dense = next(c for c in cells if c.arm == "dense")
    palette = [
        mpl.colormaps[name](i) for name, n in (("tab20", 20), ("Dark2", 8)) for i in range(n)
    ]
    colours = dict(zip(ARMS, itertools.cycle(palette), strict=False))
    axes.axhline(percent(dense.pgd), color="black", lw=0.8, ls=":", label="dense")
    for arm, runs in by_arm([c for c in cells if c.arm != "dense"]).items():
        points = sorted((c.macs / dense.macs, percent(c.pgd)) for c in runs)
        peer = arm.startswith("tp-")
        axes.plot(
            [100 * x for x, _ in points],
            [y for _, y in points],
            color="crimson" if arm == BEST else colours[arm],
            marker="." if peer else "o",
            ms=4,
            lw=2.2 if arm == BEST else 0.9,
            ls="--" if peer else (":" if arm.endswith(WITHOUT_FIT) else "-"),
            label=arm,
        )
    axes.set_xlabel("multiply-adds left (%)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def by_arm(cells: Sequence[C]) -> dict[str, list[C]]:
    """Return the cells of each arm, in the order of the first ones."""
    found: dict[str, list[C]] = {}
    for cell in cells:
        found.setdefault(cell.arm, []).append(cell)
    return found


def spread(runs: Sequence[Cell], attack: Attack) -> str:
    """Write the accuracy of runs with its interval; nothing where none was attacked."""
    return interval_of([getattr(c, attack) for c in runs])


def interval_of(verdicts: Sequence[str]) -> str:
    """One seed: the Wilson interval over images. More: the t interval over seeds."""
    found = [v for v in verdicts if v]
    if not found:
        return ""
    if len(found) == 1:
        low, high = Proportion(found[0].count("1"), len(found[0])).interval
        return f"{percent(found[0]):.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    values = [percent(f) for f in found]
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def params(runs: Sequence[Cell]) -> str:
    """Write the mean number of parameters."""
    return f"{statistics.mean(c.params for c in runs):,.0f}"


def p_value(value: float) -> str:
    """Write a p value with two digits, none below a ten-thousandth; nothing if it is NaN."""
    if math.isnan(value):
        return ""
    return f"p = {value:.2g}" if value >= 1e-4 else "p < 1e-4"
