"""The most log-capacity: for networks that are fine-tuned for long."""

from __future__ import annotations

from robust_prune.allocation.capacity import allocate_by_capacity
from robust_prune.allocation.evidence import Evidence
from robust_prune.allocation.problem import Problem, Widths
from robust_prune.registry import allocation_rule


@allocation_rule("capacity")
def capacity(problem: Problem, evidence: Evidence) -> list[Widths]:
    """Return the widths with the greatest sum of log(parameters) over layers."""
    return [allocate_by_capacity(problem)]
