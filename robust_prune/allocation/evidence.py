"""What an allocation decides by, and what it gives."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from robust_prune.allocation.problem import Problem, Widths
from robust_prune.allocation.search import CAPS
from robust_prune.errors import UsageError
from robust_prune.registry import ALLOCATIONS
from robust_prune.types import Curve


@dataclass(frozen=True)
class Evidence:
    """What was measured on a model, by group.

    Attributes:
        mrs: module robustness sensitivity, in nats.
        curves: the loss of masking a group, where the allocation asks for it.
        caps: how far curves are trusted, from equal shares (0) to whatever they ask for (1), by
            candidate.
    """

    mrs: Mapping[str, float]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    caps: Sequence[float] = CAPS


def allocations(name: str, problem: Problem, evidence: Evidence) -> list[Widths]:
    """Return the widths that a rule gives: one allocation, or several to choose among by attack.

    Args:
        name: of the rule, or `package.module:function`.
        problem: groups, cost, budget and limits.
        evidence: what was measured.

    Raises:
        BudgetError: the budget is out of reach.
        UsageError: the rule gives no widths, or some that a group can't have.
    """
    found = ALLOCATIONS.find(name)(problem, evidence)
    several = [found] if isinstance(found, Mapping) else list(found)
    for widths in several or [{}]:
        for group in problem.groups:
            width = widths.get(group.name)
            least, most = group.min_width, group.width
            if group.name in problem.fixed:
                least = most = problem.fixed[group.name]
            whole = isinstance(width, numbers.Integral) and int(width) % group.blocks == 0
            if not whole or not least <= int(width or 0) <= most:
                by = f", a multiple of {group.blocks}" if group.blocks > 1 else ""
                raise UsageError(
                    f"allocation {name!r} gives group {group.name!r} the width {width!r}; it must "
                    f"be {f'{least} to {most}{by}' if least < most else f'{least}, as asked'}"
                )
    return [{group: int(width) for group, width in widths.items()} for widths in several]
