"""What every allocation solves: groups, their exact cost, a budget, and the limits of a group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from robust_prune.errors import BudgetError
from robust_prune.options import PlanningOptions
from robust_prune.types import Budget, ChannelGroup, Cost

MAX_PRUNE_RATIO = PlanningOptions.max_prune_ratio
Widths = dict[str, int]
CostOf = Callable[[Mapping[str, int]], Cost]


@dataclass(frozen=True)
class Problem:
    """Which groups give how much, and within which limits.

    Attributes:
        groups: the prunable groups.
        cost: exact cost of the model at given widths; groups without one stay whole.
        budget: what to remove.
        max_prune_ratio: share of a group that may go at most, in (0, 1).
        round_to: widths become multiples of this, where a group is wide enough for one.
        also: further budgets that must hold too. Costs are then those of the target that is
            furthest from its goal, in units of the first.
        fixed: widths that are decided, by group.
        price: what the model takes at given widths, in milliseconds, where the budget is about
            that.
        layers: weights by layer at given widths, of the layers that groups touch.
        by_macs: whether steps are priced by the multiply-adds that they save, whatever the budget
            is in; it ends the steps all the same.
    """

    groups: Sequence[ChannelGroup]
    cost: CostOf
    budget: Budget
    max_prune_ratio: float = MAX_PRUNE_RATIO
    round_to: int = 1
    also: tuple[Budget, ...] = ()
    fixed: Mapping[str, int] = field(default_factory=dict)
    price: Callable[[Mapping[str, int]], float] | None = None
    layers: Callable[[Mapping[str, int]], Mapping[str, int]] | None = None
    by_macs: bool = False

    @cached_property
    def dense(self) -> float:
        """What the whole model costs, in units of the budget's target."""
        return self.cost_at({})

    @cached_property
    def goal(self) -> float:
        """What the budget leaves of it."""
        return self._goals[0]

    @cached_property
    def narrowest(self) -> Widths:
        """The least width that each group may keep."""
        return {g.name: self.width(g, self.max_prune_ratio) for g in self.groups}

    @cached_property
    def widest(self) -> Widths:
        """The most that each group may keep."""
        return {g.name: self.fixed.get(g.name, g.width) for g in self.groups}

    @cached_property
    def free(self) -> tuple[ChannelGroup, ...]:
        """Groups whose widths are not decided."""
        return tuple(g for g in self.groups if g.name not in self.fixed)

    def cost_at(self, widths: Mapping[str, int]) -> float:
        """Return the cost at these widths, in units of the budget's target."""
        costs = self._costs_at(widths)
        if not self.also:
            return costs[0]
        return self.goal * max(c / goal for c, goal in zip(costs, self._goals, strict=True))

    def spent(self, widths: Mapping[str, int]) -> float:
        """Return what a step is to save of: the cost, of several budgets what is above their goals.

        Those add up, each in shares of its goal, so that a step is worth something as long as it
        saves any that is not reached.
        """
        if self.by_macs:
            return self.cost(widths).macs
        costs = self._costs_at(widths)
        if not self.also:
            return costs[0]
        return sum(max(c / goal - 1, 0) for c, goal in zip(costs, self._goals, strict=True))

    def met(self, widths: Mapping[str, int], spent: float) -> bool:
        """Return whether no budget is missed at these widths, at which this is `spent`."""
        if self.by_macs:
            return self.cost_at(widths) <= self.goal
        return spent <= (0.0 if self.also else self.goal)

    def miss(self, widths: Mapping[str, int]) -> float:
        """Return how far the cost at these widths is from the goal.

        Of several budgets none may be missed, so that what is above is further than all below.
        """
        over = self.cost_at(widths) - self.goal
        return abs(over) + (self.dense if self.also and over > 0 else 0)

    def step(self, group: ChannelGroup) -> int:
        """Return how many units go at a time, so that widths stay multiples of `round_to`."""
        return _step(group, self.round_to)

    def width(self, group: ChannelGroup, prune_ratio: float) -> int:
        """Return the width that is left of a group without this share of its units."""
        if group.name in self.fixed:
            return self.fixed[group.name]
        return width_after(group, prune_ratio, self.round_to)

    def check_reach(self, narrowest: Mapping[str, int]) -> None:
        """Raise BudgetError if even these widths cost more than the budget leaves."""
        pairs = zip(self._costs_at({}), self._costs_at(narrowest), strict=True)
        for budget, (dense, least) in zip((self.budget, *self.also), pairs, strict=True):
            most = 1 - least / dense
            if most < budget.prune_ratio:
                raise BudgetError(self._out_of_reach(budget, most))

    def _out_of_reach(self, budget: Budget, most: float) -> str:
        possible = f"{math.floor(1000 * max(most, 0)) / 1000:g}"
        if budget is self.budget and self.price is not None:
            return (
                f"{100 * budget.prune_ratio:.1f} % less time is out of reach: about "
                f"{100 * most:.1f} % can go by removing channels; use --ratio {possible} or less"
            )
        flag = "--ratio " if budget is self.budget else f"--also {budget.target}="
        ways = [f"use {flag}{possible} or less"] if float(possible) else []
        ways += ["round to less than --round-to " + str(self.round_to)] if self.round_to > 1 else []
        multiples = f", widths are multiples of {self.round_to}" if self.round_to > 1 else ""
        return (
            f"removing {100 * budget.prune_ratio:.1f} % of the {budget.target} is "
            f"out of reach: at most {100 * most:.1f} % can go while every group keeps its "
            f"minimum{multiples} and protected layers stay; "
            f"{', or '.join([*ways, 'protect fewer layers'])}"
        )

    def _costs_at(self, widths: Mapping[str, int]) -> list[float]:
        """Return what each budget counts at these widths."""
        if self.price is not None and not self.also:
            return [self.price(widths)]
        cost = self.cost(widths)
        first = cost.of(self.budget.target) if self.price is None else self.price(widths)
        return [first, *(cost.of(budget.target) for budget in self.also)]

    @cached_property
    def _goals(self) -> list[float]:
        """What each budget leaves."""
        budgets = zip((self.budget, *self.also), self._costs_at({}), strict=True)
        return [dense * (1 - budget.prune_ratio) for budget, dense in budgets]


def width_after(group: ChannelGroup, prune_ratio: float, round_to: int = 1) -> int:
    """Return the width that is left of a group without this share of its units, in [0, 1]."""
    step = _step(group, round_to)
    least = math.ceil(group.min_units / step) * step
    units = max(least, step * round(group.units * (1 - prune_ratio) / step))
    return min(units, group.units) * group.blocks


def _step(group: ChannelGroup, round_to: int) -> int:
    return math.lcm(group.blocks, round_to) // group.blocks
