"""Log-capacity: what a network can still learn, as a sum over its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from robust_prune.allocation.greedy import narrowed
from robust_prune.allocation.problem import Problem, Widths
from robust_prune.allocation.widths import CLOSE, fit
from robust_prune.errors import UsageError
from robust_prune.types import ChannelGroup


def log_capacity(layers: Mapping[str, int], weights: Mapping[str, float] | None = None) -> float:
    """Return the sum over layers of weight * log(parameters).

    Args:
        layers: parameters by layer.
        weights: of the layers, 1 for those without one.
    """
    known = weights or {}
    return sum(known.get(name, 1.0) * math.log(size) for name, size in layers.items())


def allocate_by_capacity(problem: Problem, weights: Mapping[str, float] | None = None) -> Widths:
    """Return the widths that meet the budget with the most log-capacity left.

    A layer that loses a share of its parameters loses the same capacity whatever its size, so
    that with equal weights what is saved is taken where a share saves most: layers tend to equal
    multiply-adds, and a group that many layers read or write stays wider. Ours, after what was
    seen of fine-tuned networks: their robustness follows sums of logarithms of widths.

    Args:
        problem: groups, cost, budget and limits, with its layers.
        weights: how much a layer's capacity is worth, 1 for those without one.

    Raises:
        BudgetError: the budget is out of reach.
        UsageError: the problem does not say what its layers count.
    """
    sizes = problem.layers
    if sizes is None:
        raise UsageError("capacity needs to know the layers: Problem(..., layers=graph.layers)")

    def rise(g: ChannelGroup, widths: Mapping[str, int], after: int) -> float:
        narrower = sizes({**widths, g.name: after})
        return log_capacity(sizes(widths), weights) - log_capacity(narrower, weights)

    return fit(problem, narrowed(problem, rise), CLOSE)
