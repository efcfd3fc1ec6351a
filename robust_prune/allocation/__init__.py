"""How a budget is shared out among groups, and the plan made of it."""

from robust_prune.allocation.plan import make_plan
from robust_prune.allocation.search import CAPS, PASSES, STEPS, best_composed, candidate_widths
from robust_prune.allocation.widths import (
    ALLOCATIONS,
    EVEN,
    MAX_PRUNE_RATIO,
    RULES,
    SPREAD,
    CostOf,
    allocate,
    allocate_by_curves,
    group_weights,
)

__all__ = [
    "ALLOCATIONS",
    "CAPS",
    "CostOf",
    "EVEN",
    "MAX_PRUNE_RATIO",
    "PASSES",
    "RULES",
    "SPREAD",
    "STEPS",
    "allocate",
    "allocate_by_curves",
    "best_composed",
    "candidate_widths",
    "make_plan",
    "group_weights",
]
