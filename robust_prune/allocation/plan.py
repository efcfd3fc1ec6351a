"""From widths to a plan: which channels of every group stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from robust_prune.allocation.widths import MAX_PRUNE_RATIO, TOLERANCE, CostOf, _width
from robust_prune.types import (
    Budget,
    ChannelGroup,
    GroupPlan,
    PruningPlan,
    Unprunable,
)


def make_plan(
    groups: Sequence[ChannelGroup],
    widths: Mapping[str, int],
    scores: Mapping[str, Sequence[float]],
    cost_of: CostOf,
    budget: Budget,
    *,
    allocation: str,
    score: str,
    seed: int,
    input_size: tuple[int, int, int],
    mrs: Mapping[str, float] | None = None,
    max_prune_ratio: float = MAX_PRUNE_RATIO,
    unprunable: Sequence[Unprunable] = (),
    notes: Sequence[str] = (),
    ties: Sequence[tuple[str, str]] = (),
    whole_heads: bool = False,
) -> PruningPlan:
    """Return the plan that keeps the best-scored units of every group.

    Equal scores keep the earlier channel. A budget missed by more than a point is noted.
    """
    plan = PruningPlan(
        budget=budget,
        allocation=allocation,
        score=score,
        seed=seed,
        input_size=input_size,
        dense=cost_of({}),
        pruned=cost_of(widths),
        groups=tuple(
            GroupPlan(
                name=group.name,
                width=group.width,
                keep=_keep(group, widths[group.name] // group.blocks, scores[group.name]),
                mrs=(mrs or {}).get(group.name),
                note=_note(group, widths[group.name], max_prune_ratio),
            )
            for group in groups
        ),
        unprunable=tuple(unprunable),
        notes=tuple(notes),
        ties=tuple(ties),
        whole_heads=whole_heads,
    )
    miss = plan.reached - budget.prune_ratio
    if abs(miss) > TOLERANCE:
        line = (
            f"asked to remove {100 * budget.prune_ratio:.1f} % of the {budget.target}, "
            f"{100 * plan.reached:.1f} % are removed: the groups are too narrow for a closer fit"
        )
        plan = replace(plan, notes=(*plan.notes, line))
    return plan


def _keep(group: ChannelGroup, units: int, scores: Sequence[float]) -> tuple[int, ...]:
    order = sorted(range(group.units), key=lambda unit: (-scores[unit], unit))
    kept = set(order[:units])
    return tuple(i for i in range(group.width) if group.unit(i) in kept)


def _note(group: ChannelGroup, width: int, max_prune_ratio: float) -> str:
    if group.width > width == group.min_units * group.blocks:
        return "at its minimum width"
    if group.width > width == _width(group, max_prune_ratio):
        return f"at the most that may go, {100 * max_prune_ratio:g} %"
    return ""
