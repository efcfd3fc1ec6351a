"""From sensitivities, costs and a budget to a plan: how many units each group keeps, and which."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from robust_prune.errors import BudgetError, UsageError
from robust_prune.types import (
    Budget,
    ChannelGroup,
    Cost,
    Curve,
    Target,
)

Allocation = Literal["curve", "mrs", "inverted", "uniform"]
ALLOCATIONS: tuple[Allocation, ...] = ("curve", "mrs", "inverted", "uniform")
RULES = ALLOCATIONS[1:]  # from one number for each group
MAX_PRUNE_RATIO = 0.95
SPREAD = 0.9
SMALLEST_SHARE = 1e-3
TOLERANCE = 0.01
CLOSE = 0.002
EVEN = 1e-4  # nats: shares what costs nothing evenly among equals
Widths = dict[str, int]
CostOf = Callable[[Mapping[str, int]], Cost]


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


def allocate(
    groups: Sequence[ChannelGroup],
    cost_of: CostOf,
    budget: Budget,
    willingness: Mapping[str, float],
    *,
    max_prune_ratio: float = MAX_PRUNE_RATIO,
    round_to: int = 1,
) -> Widths:
    """Return the width of each group that meets the budget.

    The share r_g = min(lambda * willingness_g, max_prune_ratio) goes from every group, rounded to
    whole units; lambda is bisected on the exact cost. Between the last two values of lambda the
    groups that still differ change one by one, so that ties don't cost accuracy of the budget.

    Args:
        groups: the prunable groups.
        cost_of: exact cost of the model at given widths.
        budget: what to remove.
        willingness: `weights`, by group.
        max_prune_ratio: share of a group that may go at most.
        round_to: widths become multiples of this, where a group is wide enough for one.

    Raises:
        BudgetError: the budget is out of reach; the message says what is possible.
    """
    if not groups:
        raise BudgetError("the model has no prunable group; see the reasons in its report")
    target = budget.target
    dense = cost_of({}).of(target)
    goal = dense * (1 - budget.prune_ratio)

    def widths_at(scale: float) -> Widths:
        return {
            g.name: _width(g, min(scale * willingness[g.name], max_prune_ratio), round_to)
            for g in groups
        }

    low, high = 0.0, max_prune_ratio / min(willingness[g.name] for g in groups)
    _check_reach(cost_of, budget, widths_at(high))
    for _ in range(60):
        middle = (low + high) / 2
        if cost_of(widths_at(middle)).of(target) > goal:
            low = middle
        else:
            high = middle
    found = _closest_between(groups, cost_of, target, goal, widths_at(low), widths_at(high))
    floor = widths_at(math.inf)
    return _fit(groups, cost_of, target, goal, found, floor, round_to, TOLERANCE)


def allocate_by_curves(
    groups: Sequence[ChannelGroup],
    cost_of: CostOf,
    budget: Budget,
    curves: Mapping[str, Curve],
    *,
    max_prune_ratio: float = MAX_PRUNE_RATIO,
    round_to: int = 1,
) -> Widths:
    """Return the widths that meet the budget for the least sum of predicted loss rises.

    From the dense model on, the group whose next step costs the least rise per unit of cost
    gives it, along the convex hull of its curve. What a step saves is counted on the whole model,
    with its neighbours as narrow as they are by then. Prices only rise on the way (hulls get
    steeper, narrower neighbours save less), so that a price still lowest when counted anew is the
    lowest of all, and the others can wait.

    Raises:
        BudgetError: the budget is out of reach.
    """
    target = budget.target
    goal = cost_of({}).of(target) * (1 - budget.prune_ratio)
    floor = {g.name: _width(g, max_prune_ratio, round_to) for g in groups}
    _check_reach(cost_of, budget, floor)
    hulls = {name: curve.hull() for name, curve in curves.items()}
    widths = {g.name: g.width for g in groups}
    steps = {g.name: _step(g, round_to) for g in groups}
    strides = {g.name: steps[g.name] * max(1, g.units // steps[g.name] // 24) for g in groups}

    def next_width(g: ChannelGroup) -> int:
        units = widths[g.name] // g.blocks - strides[g.name]
        units -= units % steps[g.name]  # dense widths need be no multiples
        return max(units * g.blocks, floor[g.name])

    def price(g: ChannelGroup) -> float:
        """Loss rise per cost saved of the group's next step."""
        after = next_width(g)
        if after >= widths[g.name]:
            return math.inf
        saved = now - cost_of({**widths, g.name: after}).of(target)
        share, before = 1 - after / g.width, 1 - widths[g.name] / g.width
        rise = hulls[g.name].at(share) - hulls[g.name].at(before)
        rise += EVEN * (share**2 - before**2)
        return rise / saved if saved > 0 else math.inf

    now = cost_of(widths).of(target)
    queue = [(price(g), i) for i, g in enumerate(groups)]
    heapq.heapify(queue)
    while now > goal and queue:
        _, i = heapq.heappop(queue)
        g = groups[i]
        fresh = price(g), i
        if math.isinf(fresh[0]):
            continue  # it has given what it can
        if queue and fresh > queue[0]:
            heapq.heappush(queue, fresh)
            continue
        widths[g.name] = next_width(g)
        now = cost_of(widths).of(target)
        heapq.heappush(queue, (price(g), i))
    return _fit(groups, cost_of, target, goal, widths, floor, round_to, CLOSE)


def _check_reach(cost_of: CostOf, budget: Budget, narrowest: Widths) -> None:
    """Raise BudgetError if even these widths cost more than the budget leaves."""
    most = 1 - cost_of(narrowest).of(budget.target) / cost_of({}).of(budget.target)
    if most < budget.prune_ratio:
        raise BudgetError(
            f"removing {100 * budget.prune_ratio:.1f} % of the {budget.target} is out of reach: at "
            f"most {100 * most:.1f} % can go while every group keeps its minimum and protected "
            f"layers stay; use --ratio {math.floor(1000 * most) / 1000:g} or less, or protect "
            "fewer layers"
        )


def _fit(
    groups: Sequence[ChannelGroup],
    cost_of: CostOf,
    target: Target,
    goal: float,
    widths: Widths,
    floor: Widths,
    round_to: int,
    close: float,
) -> Widths:
    """Move single units, of any group, until the cost is close to the goal or comes no closer."""

    def miss(tried: Widths) -> float:
        return abs(cost_of(tried).of(target) - goal)

    best, enough = miss(widths), close * cost_of({}).of(target)
    steps = {g.name: _step(g, round_to) * g.blocks for g in groups}
    while best > enough:
        tried = [
            {**widths, g.name: width}
            for g in groups
            for width in (widths[g.name] - steps[g.name], widths[g.name] + steps[g.name])
            if floor[g.name] <= width <= g.width and width % steps[g.name] == 0
        ]
        closest = min(tried, key=miss, default=widths)
        if miss(closest) >= best:
            break
        widths, best = closest, miss(closest)
    return widths


def _closest_between(
    groups: Sequence[ChannelGroup],
    cost_of: CostOf,
    target: str,
    goal: float,
    above: Widths,
    below: Widths,
) -> Widths:
    """Walk from just above the goal to just below it, group by group, and keep the closest."""
    current, best = dict(above), dict(above)
    best_miss = math.inf
    steps = [None, *(g.name for g in groups if above[g.name] != below[g.name])]
    for name in steps:
        if name is not None:
            current[name] = below[name]
        miss = abs(int(getattr(cost_of(current), target)) - goal)
        if miss < best_miss:
            best, best_miss = dict(current), miss
    return best


def _width(group: ChannelGroup, prune_ratio: float, round_to: int = 1) -> int:
    step = _step(group, round_to)
    least = math.ceil(group.min_units / step) * step
    units = max(least, step * round(group.units * (1 - prune_ratio) / step))
    return min(units, group.units) * group.blocks


def _step(group: ChannelGroup, round_to: int) -> int:
    """How many units go at a time, so that widths stay multiples of `round_to`."""
    return math.lcm(group.blocks, round_to) // group.blocks
