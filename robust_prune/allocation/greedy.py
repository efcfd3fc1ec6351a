"""From the dense model down to a budget, always by the step that is cheapest for what it saves."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping

from robust_prune.allocation.problem import Problem, Widths
from robust_prune.types import ChannelGroup

STRIDES = 24  # of a wide group, from whole to nothing
Rise = Callable[[ChannelGroup, Mapping[str, int], int], float]


def narrowed(problem: Problem, rise: Rise) -> Widths:
    """Return the widths at which no budget is missed, reached by the cheapest steps.

    The group whose next step costs the least per unit of cost saved gives it. What a step saves is
    counted on the whole model, with its neighbours as narrow as they are by then. Prices must only
    rise on the way (they do where losses are convex, as narrower neighbours save less), so that a
    price still lowest when counted anew is the lowest of all, and the others can wait.

    Args:
        problem: groups, cost, budget and limits.
        rise: what it costs, in any unit, that a group of these widths gets the width given last.

    Raises:
        BudgetError: the budget is out of reach.
    """
    groups = problem.groups
    problem.check_reach(problem.narrowest)
    widths = dict(problem.widest)

    def step(g: ChannelGroup) -> tuple[float, int]:
        """Return what the next step that saves anything costs, and the width after it."""
        before = after = widths[g.name]
        while (narrower := _next_width(problem, g, after)) < after:
            after = narrower
            saved = now - problem.spent({**widths, g.name: after})
            if saved > 0:  # time need not fall with every channel
                return rise(g, widths, after) / saved, after
        return math.inf, before

    now = problem.spent(widths)
    queue = [(step(g)[0], i) for i, g in enumerate(groups)]
    heapq.heapify(queue)
    while queue and not problem.met(widths, now):
        _, i = heapq.heappop(queue)
        g = groups[i]
        price, after = step(g)
        if math.isinf(price):
            continue  # it has given what it can
        if queue and (price, i) > queue[0]:
            heapq.heappush(queue, (price, i))
            continue
        widths[g.name] = after
        now = problem.spent(widths)
        heapq.heappush(queue, (step(g)[0], i))
    return widths


def _next_width(problem: Problem, g: ChannelGroup, width: int) -> int:
    """Return what a group is cut to next."""
    step = problem.step(g)
    units = width // g.blocks - step * max(1, g.units // step // STRIDES)
    units -= units % step  # dense widths need be no multiples
    return max(units * g.blocks, problem.narrowest[g.name])
