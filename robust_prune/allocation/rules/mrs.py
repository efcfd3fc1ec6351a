"""The paper's rule: the more sensitive a group, the less it loses."""

from __future__ import annotations

from robust_prune.allocation.evidence import Evidence
from robust_prune.allocation.problem import Problem, Widths
from robust_prune.allocation.widths import allocate, group_weights
from robust_prune.registry import allocation_rule


@allocation_rule("mrs")
def mrs(problem: Problem, evidence: Evidence) -> list[Widths]:
    """Return shares that fall with log(MRS)."""
    return [allocate(problem, group_weights("mrs", evidence.mrs))]
