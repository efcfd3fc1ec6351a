"""What every allocation solves: groups, their exact cost, a budget, and the limits of a group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    """

    groups: Sequence[ChannelGroup]
    cost: CostOf
    budget: Budget
    max_prune_ratio: float = MAX_PRUNE_RATIO
    round_to: int = 1

    @cached_property
    def dense(self) -> int:
        """What the whole model costs, in units of the budget's target."""
        return self.cost_at({})

    @cached_property
    def goal(self) -> float:
        """What the budget leaves of it."""
        return self.dense * (1 - self.budget.prune_ratio)

    @cached_property
    def narrowest(self) -> Widths:
        """The least width that each group may keep."""
        return {g.name: self.width(g, self.max_prune_ratio) for g in self.groups}

    def cost_at(self, widths: Mapping[str, int]) -> int:
        """Return the cost at these widths, in units of the budget's target."""
        return self.cost(widths).of(self.budget.target)

    def miss(self, widths: Mapping[str, int]) -> float:
        """Return how far the cost at these widths is from the goal."""
        return abs(self.cost_at(widths) - self.goal)

    def step(self, group: ChannelGroup) -> int:
        """Return how many units go at a time, so that widths stay multiples of `round_to`."""
        return _step(group, self.round_to)

    def width(self, group: ChannelGroup, prune_ratio: float) -> int:
        """Return the width that is left of a group without this share of its units."""
        return width_after(group, prune_ratio, self.round_to)

    def check_reach(self, narrowest: Mapping[str, int]) -> None:
        """Raise BudgetError if even these widths cost more than the budget leaves."""
        most = 1 - self.cost_at(narrowest) / self.dense
        if most < self.budget.prune_ratio:
            raise BudgetError(
                f"removing {100 * self.budget.prune_ratio:.1f} % of the {self.budget.target} is "
                f"out of reach: at most {100 * most:.1f} % can go while every group keeps its "
                "minimum and protected layers stay; use --ratio "
                f"{math.floor(1000 * most) / 1000:g} or less, or protect fewer layers"
            )


def width_after(group: ChannelGroup, prune_ratio: float, round_to: int = 1) -> int:
    """Return the width that is left of a group without this share of its units, in [0, 1]."""
    step = _step(group, round_to)
    least = math.ceil(group.min_units / step) * step
    units = max(least, step * round(group.units * (1 - prune_ratio) / step))
    return min(units, group.units) * group.blocks


def _step(group: ChannelGroup, round_to: int) -> int:
    return math.lcm(group.blocks, round_to) // group.blocks
