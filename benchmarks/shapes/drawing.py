"""Shapes of one network at one cost: by rule, and drawn at random."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from robust_prune.allocation import (
    Problem,
    allocate,
    allocate_by_capacity,
    allocate_evenly,
    candidate_widths,
    group_weights,
)
from robust_prune.errors import BudgetError
from robust_prune.types import Curve, Sensitivity

BLENDS = 0.25, 0.5, 0.75  # of log-capacity's widths in those of curves, geometrically
LEAST, MOST = 0.15, 1.0  # what random shapes ask of a group, in shares of the others' loss


@dataclass(frozen=True)
class Evidence:
    """What rules decide by: MRS of layers and groups, and the curves of groups."""

    sensitivity: Sensitivity
    curves: Mapping[str, Curve]


def shapes(problem: Problem, evidence: Evidence, drawn: int) -> dict[str, dict[str, int]]:
    """Return widths by name, each shape once, at the problem's budget.

    Args:
        problem: groups, cost, budget and limits, with its layers.
        evidence: what the rules decide by.
        drawn: how many random ones.
    """
    layers = {m.name: m.mrs for m in evidence.sensitivity.modules}
    found = {"even": allocate_evenly(problem), "capacity": allocate_by_capacity(problem)}
    for name, weights in layer_weights(layers).items():
        found[f"capacity-{name}"] = allocate_by_capacity(problem, weights)
    curves = candidate_widths(problem, evidence.curves)[1:]
    for i, widths in enumerate(curves, 1):
        found[f"curve-{i}"] = widths
    for share in BLENDS:
        middle = curves[len(curves) // 2]
        found[f"blend-{share:g}"] = between(problem, middle, found["capacity"], share)
    for rule in ("mrs", "inverted"):
        found[rule] = allocate(problem, group_weights(rule, evidence.sensitivity.of_groups()))
    for i in range(drawn):
        found[f"random-{i}"] = at_random(problem, random.Random(i))
    once: dict[tuple[tuple[str, int], ...], str] = {}
    for name, widths in found.items():
        once.setdefault(tuple(sorted(widths.items())), name)
    return {name: dict(widths) for widths, name in once.items()}


def between(
    problem: Problem, first: Mapping[str, int], second: Mapping[str, int], share: float
) -> dict[str, int]:
    """Return widths at the budget between two others, `share` of the way on a logarithmic scale."""
    goes = {
        g.name: max(
            1 - (first[g.name] / g.width) ** (1 - share) * (second[g.name] / g.width) ** share, 1e-3
        )
        for g in problem.groups
    }
    return allocate(problem, goes)


def layer_weights(mrs: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return the weights of log-capacity that MRS of layers is tried as, and the control.

    `mrs` is MRS itself, its mean scaled to 1; `log` spans e from the least to the most sensitive
    on a logarithmic scale, `rank` 3 on ranks; `unrank` turns `rank` upside down.
    """
    order = sorted(mrs, key=lambda name: mrs[name])
    last = max(len(order) - 1, 1)
    mean = sum(mrs.values()) / len(mrs) or 1.0
    rank = {name: 0.5 + i / last for i, name in enumerate(order)}
    willing = group_weights("mrs", mrs)  # 0.1 for the most sensitive to 1
    return {
        "mrs": {name: value / mean for name, value in mrs.items()},
        "log": {name: 1.6 - value for name, value in willing.items()},
        "rank": rank,
        "unrank": {name: 2 - value for name, value in rank.items()},
    }


def at_random(problem: Problem, draw: random.Random) -> dict[str, int]:
    """Return widths where every group gives a share drawn by itself, scaled to the budget."""
    while True:
        asked = {g.name: draw.uniform(LEAST, MOST) for g in problem.groups}
        try:
            return allocate(problem, asked)
        except BudgetError:
            continue  # too unwilling in all that could give
