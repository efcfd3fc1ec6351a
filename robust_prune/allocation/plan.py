"""From widths to a plan: which channels of every group stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from robust_prune.allocation.problem import Problem, width_after
from robust_prune.allocation.widths import TOLERANCE
from robust_prune.types import Budget, ChannelGroup, GroupPlan, PruningPlan, Unprunable

ASKED = "asked to remove"  # how a note begins that is about a budget


def make_plan(
    problem: Problem,
    widths: Mapping[str, int],
    scores: Mapping[str, Sequence[float]],
    *,
    allocation: str,
    score: str,
    seed: int,
    input_size: tuple[int, int, int],
    mrs: Mapping[str, float] | None = None,
    unprunable: Sequence[Unprunable] = (),
    notes: Sequence[str] = (),
    ties: Sequence[tuple[str, str]] = (),
    whole_heads: bool = False,
    blocks: Sequence[str] = (),
) -> PruningPlan:
    """Return the plan that keeps the best-scored units of every group.

    Equal scores keep the earlier channel. A budget missed by more than a point is noted.

    Args:
        problem: groups, cost, budget and limits.
        widths: to keep, by group.
        scores: by group, of every unit; the lowest go first.
        allocation: the rule that gave the widths, for the record.
        score: the one that gave the scores, for the record.
        seed: of the run, for the record.
        input_size: (channels, height, width) that the costs are counted at.
        mrs: by group, for the record.
        unprunable: what stays as it is, and why.
        notes: what the user should not miss.
        ties: `tensor:dim` pairs that the code couples silently.
        whole_heads: heads of attentions go as a whole.
        blocks: those that go whole, by name.
    """
    budget = problem.budget
    dense, pruned = problem.cost({}), problem.cost(widths)
    if problem.price is not None:  # a plan records what can be counted, the report what was timed
        budget = Budget("macs", 1 - pruned.macs / dense.macs)
    plan = PruningPlan(
        budget=budget,
        allocation=allocation,
        score=score,
        seed=seed,
        input_size=input_size,
        dense=dense,
        pruned=pruned,
        groups=tuple(
            GroupPlan(
                name=group.name,
                width=group.width,
                keep=_keep(group, widths[group.name] // group.blocks, scores[group.name]),
                mrs=(mrs or {}).get(group.name),
                note=_note(problem, group, widths[group.name]),
            )
            for group in problem.groups
        ),
        unprunable=tuple(unprunable),
        notes=tuple(notes),
        ties=tuple(ties),
        whole_heads=whole_heads,
        blocks=tuple(blocks),
    )
    lines = [_asked_too(plan, other) for other in problem.also]
    if miss := _miss(plan):
        lines.append(_missed(plan, _why_missed(problem, miss)))
    return replace(plan, notes=(*plan.notes, *lines))


def for_all_steps(plan: PruningPlan, budget: Budget) -> PruningPlan:
    """Return a plan that was made in several steps with the budget of them all.

    What it says of budgets is said of this one.
    """
    notes = tuple(line for line in plan.notes if not line.startswith(ASKED))
    whole = replace(plan, budget=budget, notes=notes)
    if _miss(whole):
        whole = replace(whole, notes=(*notes, _missed(whole, "no step came closer")))
    return whole


def _miss(plan: PruningPlan) -> float:
    """Return by how much more than its budget a plan removes, 0 where that is within a point."""
    miss = plan.reached - plan.budget.prune_ratio
    return miss if abs(miss) > TOLERANCE else 0.0


def _missed(plan: PruningPlan, why: str) -> str:
    budget = plan.budget
    return (
        f"{ASKED} {100 * budget.prune_ratio:.1f} % of the {budget.target}, "
        f"{100 * plan.reached:.1f} % are removed: {why}"
    )


def _asked_too(plan: PruningPlan, budget: Budget) -> str:
    reached = 1 - plan.pruned.of(budget.target) / plan.dense.of(budget.target)
    return (
        f"{ASKED} {100 * budget.prune_ratio:.1f} % of the {budget.target} too, "
        f"{100 * reached:.1f} % are removed"
    )


def _why_missed(problem: Problem, miss: float) -> str:
    if miss > 0 and problem.also:
        return f"the {' or '.join(b.target for b in problem.also)} asked for take more"
    if miss > 0 and problem.cost_at(problem.widest) < problem.goal:
        if not all(problem.fixed.values()):
            return "the blocks that go whole take more"
        return "the shares asked for of single layers take more"
    return "the groups are too narrow for a closer fit"


def _keep(group: ChannelGroup, units: int, scores: Sequence[float]) -> tuple[int, ...]:
    order = sorted(range(group.units), key=lambda unit: (-scores[unit], unit))
    kept = set(order[:units])
    return tuple(i for i in range(group.width) if group.unit(i) in kept)


def _note(problem: Problem, group: ChannelGroup, width: int) -> str:
    if not width:
        return "its block goes whole"
    if group.name in problem.fixed:
        gone = 1 - width / group.width
        return f"{100 * gone:.1f} % gone, as asked of its layers"
    if group.width > width == group.min_units * group.blocks:
        return "at its minimum width"
    if group.width > width == width_after(group, problem.max_prune_ratio, problem.round_to):
        return f"at the most that may go, {100 * problem.max_prune_ratio:g} %"
    return ""
