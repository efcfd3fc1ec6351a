"""The least measured loss of each group, and the best of a few composed models."""

from __future__ import annotations

from robust_prune.allocation.evidence import Evidence
from robust_prune.allocation.problem import Problem, Widths
from robust_prune.allocation.search import candidate_widths
from robust_prune.registry import allocation_rule


@allocation_rule("curve", curves=True)
def curve(problem: Problem, evidence: Evidence) -> list[Widths]:
    """Return a few allocations, from equal shares to whatever the curves ask for."""
    return candidate_widths(problem, evidence.curves, evidence.caps)
