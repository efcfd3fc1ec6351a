"""From sensitivities or curves to widths: how many channels each group keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping

from robust_prune.allocation.greedy import narrowed
from robust_prune.allocation.problem import Problem, Widths
from robust_prune.errors import BudgetError, UsageError
from robust_prune.types import ChannelGroup, Curve

RULES = ("mrs", "inverted", "uniform")  # from one number for each group
SPREAD = 0.9
SMALLEST_SHARE = 1e-3
TOLERANCE = 0.01
CLOSE = 0.002
EVEN = 1e-4  # nats: shares what costs nothing evenly among equals


def group_weights(rule: str, mrs: Mapping[str, float]) -> dict[str, float]:
    """Return by group 1 - s_g: how willingly it gives channels, in [1 - SPREAD, 1].

    s_g is log(MRS), scaled over the groups to [0, SPREAD]; MRS spans orders of magnitude, and a
    SPREAD below 1 keeps even the most sensitive group prunable. MRS below a thousandth of the
    largest counts as that, so that a dead branch with MRS 0 does not flatten all the others.
    `inverted` turns s_g upside down and `uniform` sets it to 0; both are controls. The scaling is
    ours.
    """
    if rule not in RULES:
        raise UsageError(f"rule {rule!r} is not known; use one of {', '.join(RULES)}")
    if rule == "uniform" or not mrs:
        return dict.fromkeys(mrs, 1.0)
    floor = max(max(mrs.values()) * SMALLEST_SHARE, 1e-30)
    logs = {name: math.log(max(value, floor)) for name, value in mrs.items()}
    low, high = min(logs.values()), max(logs.values())
    spread = high - low
    scaled = {name: (v - low) / spread if spread > 0 else 0.0 for name, v in logs.items()}
    if rule == "inverted":
        scaled = {name: 1 - value for name, value in scaled.items()}
    return {name: 1 - SPREAD * value for name, value in scaled.items()}


def allocate(problem: Problem, willingness: Mapping[str, float]) -> Widths:
    """Return the width of each group that meets the budget.

    The share r_g = min(lambda * willingness_g, max_prune_ratio) goes from every group, rounded to
    whole units; lambda is bisected on the exact cost. Between the last two values of lambda the
    groups that still differ change one by one, so that ties don't cost accuracy of the budget.

    Args:
        problem: groups, cost, budget and limits.
        willingness: `group_weights`, by group.

    Raises:
        BudgetError: the budget is out of reach; the message says what is possible.
    """
    if not problem.groups:
        raise BudgetError("the model has no prunable group; see the reasons in its report")
    most = problem.max_prune_ratio

    def widths_at(scale: float) -> Widths:
        return {
            g.name: problem.width(g, min(scale * willingness[g.name], most)) for g in problem.groups
        }

    low, high = 0.0, most / min(willingness[g.name] for g in problem.groups)
    problem.check_reach(widths_at(high))
    for _ in range(60):
        middle = (low + high) / 2
        if problem.cost_at(widths_at(middle)) > problem.goal:
            low = middle
        else:
            high = middle
    return fit(problem, _closest_between(problem, widths_at(low), widths_at(high)), TOLERANCE)


def allocate_evenly(problem: Problem) -> Widths:
    """Return the widths that meet the budget with the same share from every group.

    Raises:
        BudgetError: the budget is out of reach.
    """
    return allocate(problem, dict.fromkeys((g.name for g in problem.groups), 1.0))


def allocate_by_curves(problem: Problem, curves: Mapping[str, Curve]) -> Widths:
    """Return the widths that meet the budget for the least sum of predicted loss rises.

    From the dense model on, along the convex hulls of the curves; see `narrowed`.

    Raises:
        BudgetError: the budget is out of reach.
    """
    hulls = {name: curve.hull() for name, curve in curves.items()}

    def rise(g: ChannelGroup, widths: Mapping[str, int], after: int) -> float:
        share, before = 1 - after / g.width, 1 - widths[g.name] / g.width
        loss = hulls[g.name].at(share) - hulls[g.name].at(before)
        return loss + EVEN * (share**2 - before**2)

    return fit(problem, narrowed(problem, rise), CLOSE)


def fit(problem: Problem, widths: Widths, close: float) -> Widths:
    """Move single units, of any group, until the cost is close to the goal or comes no closer."""
    best, enough = problem.miss(widths), close * problem.dense
    steps = {g.name: problem.step(g) * g.blocks for g in problem.groups}
    while best > enough:
        tried = [
            {**widths, g.name: width}
            for g in problem.groups
            for width in (widths[g.name] - steps[g.name], widths[g.name] + steps[g.name])
            if problem.narrowest[g.name] <= width <= problem.widest[g.name]
            and width % steps[g.name] == 0
        ]
        closest = min(tried, key=problem.miss, default=widths)
        if problem.miss(closest) >= best:
            break
        widths, best = closest, problem.miss(closest)
    return widths


def _closest_between(problem: Problem, above: Widths, below: Widths) -> Widths:
    """Walk from just above the goal to just below it, group by group, and keep the closest."""
    walk = [dict(above)]
    for g in problem.groups:
        if above[g.name] != below[g.name]:
            walk.append({**walk[-1], g.name: below[g.name]})
    return min(walk, key=problem.miss)
