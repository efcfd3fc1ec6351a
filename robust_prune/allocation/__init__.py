"""How a budget is shared out among groups, and the plan made of it."""

from robust_prune.allocation.bisection import ratio_for
from robust_prune.allocation.blocks import narrowest_without, without, worth_removing
from robust_prune.allocation.capacity import allocate_by_capacity, log_capacity
from robust_prune.allocation.evidence import Evidence, allocations
from robust_prune.allocation.plan import for_all_steps, make_plan
from robust_prune.allocation.problem import MAX_PRUNE_RATIO, CostOf, Problem, width_after
from robust_prune.allocation.search import CAPS, STEPS, best_composed, candidate_widths, passes_of
from robust_prune.allocation.widths import (
    EVEN,
    RULES,
    SPREAD,
    TOLERANCE,
    allocate,
    allocate_by_curves,
    allocate_evenly,
    group_weights,
)

__all__ = [
    "CAPS",
    "Evidence",
    "allocations",
    "CostOf",
    "EVEN",
    "MAX_PRUNE_RATIO",
    "Problem",
    "RULES",
    "SPREAD",
    "STEPS",
    "TOLERANCE",
    "allocate",
    "allocate_by_capacity",
    "allocate_by_curves",
    "allocate_evenly",
    "best_composed",
    "candidate_widths",
    "for_all_steps",
    "log_capacity",
    "narrowest_without",
    "make_plan",
    "group_weights",
    "passes_of",
    "ratio_for",
    "width_after",
    "without",
    "worth_removing",
]
