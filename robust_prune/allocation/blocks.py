"""Which residual blocks go whole: those that cost less than the channels that may stay for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from robust_prune.allocation.problem import Problem, Widths
from robust_prune.allocation.widths import allocate_by_curves
from robust_prune.errors import BudgetError
from robust_prune.types import Curve

PATIENCE = 3  # blocks more that may go without the sum getting less
Groups = tuple[str, ...]


def without(problem: Problem, blocks: Sequence[Groups]) -> Problem:
    """Return the problem of the model without blocks, each given by its groups.

    Raises:
        BudgetError: shares are asked of these groups.
    """
    gone = {group: 0 for groups in blocks for group in groups}
    if asked := sorted(gone.keys() & problem.fixed.keys()):
        raise BudgetError(f"{asked[0]!r} has a width that was asked for")
    return replace(problem, fixed={**problem.fixed, **gone})


def narrowest_without(problem: Problem, blocks: Iterable[Groups]) -> Widths:
    """Return the least that groups may keep where all these blocks may go whole.

    Blocks of which shares are asked stay.
    """
    free = [groups for groups in blocks if not problem.fixed.keys() & set(groups)]
    return without(problem, free).narrowest


def worth_removing(
    problem: Problem, curves: Mapping[str, Curve], rises: Mapping[Groups, float]
) -> list[Groups]:
    """Return the blocks that go, so that what goes in all costs the least predicted loss.

    Blocks go in the order of what each costs for what it saves; after each one channels make up
    for the rest of the budget, by curves. Rises are added up, those of blocks and of channels
    alike. Blocks with which more would go than is asked are passed over.

    Args:
        problem: groups, cost, budget and limits.
        curves: by group.
        rises: in nats, by the groups of a block: the loss without it.
    """
    dense = problem.cost_at({})

    def price(groups: Groups) -> float:
        saved = dense - problem.cost_at(dict.fromkeys(groups, 0))
        return rises[groups] / saved if saved > 0 else float("inf")

    order = sorted((g for g in rises if not problem.fixed.keys() & set(g)), key=price)
    gone: list[Groups] = []
    best, least, worse = gone, _predicted(problem, curves), 0
    for groups in order:
        left = without(problem, [*gone, groups])
        if left.cost_at(left.widest) < left.goal:
            continue
        gone = [*gone, groups]
        loss = sum(max(rises[g], 0.0) for g in gone) + _predicted(left, curves)
        if loss < least:
            best, least, worse = gone, loss, 0
        elif least < float("inf"):
            worse += 1
        if worse == PATIENCE:
            break
    return best


def _predicted(problem: Problem, curves: Mapping[str, Curve]) -> float:
    """Return the sum of the groups' loss rises at the widths that curves give, in nats."""
    try:
        widths: Widths = allocate_by_curves(problem, curves)
    except BudgetError:
        return float("inf")
    shares = {g.name: 1 - widths[g.name] / g.width for g in problem.free}
    return sum(curves[name].hull().at(share) for name, share in shares.items())
