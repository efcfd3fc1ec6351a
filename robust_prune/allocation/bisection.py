"""The ratio at which somebody else's pruner meets a budget."""

from __future__ import annotations

from collections.abc import Callable

from robust_prune.allocation.widths import CLOSE
from robust_prune.errors import BudgetError
from robust_prune.types import Budget

HALVINGS = 16  # finer than one channel of 65,536


def ratio_for(budget: Budget, reached: Callable[[float], float]) -> tuple[float, float]:
    """Return the ratio that comes closest to the budget, and the share removed at it.

    Args:
        budget: what to remove.
        reached: share of the budget's target that is gone at a ratio in [0, 1]; it never falls.

    Raises:
        BudgetError: not even ratio 1 removes as much; the message says what is possible.
    """
    asked = budget.prune_ratio
    low, high, most = 0.0, 1.0, reached(1.0)
    if most < asked - CLOSE:
        raise BudgetError(
            f"removing {100 * asked:.1f} % of the {budget.target} is out of reach: at most "
            f"{100 * most:.1f} % can go while every group keeps its minimum and ignored layers stay"
        )
    tried = {high: most}
    for _ in range(HALVINGS):
        ratio = min(tried, key=lambda r: abs(tried[r] - asked))
        if abs(tried[ratio] - asked) <= CLOSE:
            break
        middle = (low + high) / 2
        tried[middle] = reached(middle)
        low, high = (middle, high) if tried[middle] < asked else (low, middle)
    ratio = min(tried, key=lambda r: abs(tried[r] - asked))
    return ratio, tried[ratio]
