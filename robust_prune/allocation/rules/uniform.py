"""The same share from every group; a control."""

from __future__ import annotations

from robust_prune.allocation.evidence import Evidence
from robust_prune.allocation.problem import Problem, Widths
from robust_prune.allocation.widths import allocate_evenly
from robust_prune.registry import allocation_rule


@allocation_rule("uniform")
def uniform(problem: Problem, evidence: Evidence) -> list[Widths]:
    """Return equal shares of all groups."""
    return [allocate_evenly(problem)]
