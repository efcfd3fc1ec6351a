"""MRS upside down: the more sensitive a group, the more it loses; a control."""

from __future__ import annotations

from robust_prune.allocation.evidence import Evidence
from robust_prune.allocation.problem import Problem, Widths
from robust_prune.allocation.widths import allocate, group_weights
from robust_prune.registry import allocation_rule


@allocation_rule("inverted")
def inverted(problem: Problem, evidence: Evidence) -> list[Widths]:
    """Return shares that rise with log(MRS)."""
    return [allocate(problem, group_weights("inverted", evidence.mrs))]
