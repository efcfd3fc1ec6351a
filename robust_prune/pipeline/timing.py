"""A budget of time: the plan is made by a model of it, and corrected by what is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from robust_prune.allocation import Problem, narrowest_without
from robust_prune.errors import BudgetError
from robust_prune.graph import ModelGraph
from robust_prune.latency import (
    LatencyModel,
    Rounding,
    alternating,
    conditions_of,
    fast_multiple,
    latency_model,
)
from robust_prune.modules import device_of
from robust_prune.options import AUTO
from robust_prune.pipeline.job import Job
from robust_prune.pipeline.keeping import once
from robust_prune.pipeline.record import Timed
from robust_prune.pipeline.settings import Settings
from robust_prune.types import Budget, PruningPlan

ROUNDS = 8  # of corrections, at most
CLOSE = 0.01  # of the dense model's time
TOLERANCE = 0.03  # beyond it the plan says that it was missed
QUICK_PAIRS, FINAL_PAIRS = 8, 30

Making = Callable[[Problem], PruningPlan]


def latency_of(job: Job, graph: ModelGraph, settings: Settings) -> LatencyModel | None:
    """Return what the model takes as a function of its widths, where the budget is about that.

    Raises:
        BudgetError: the budget is out of reach, by this model.
    """
    if not settings.latency:
        return None
    conditions = conditions_of(settings, device_of(graph.model))
    job.journal.stage(f"timing layers: {conditions}")
    with job.journal.timed("latency"):
        blocks = graph.blocks if settings.whole_blocks else ()
        found = latency_model(graph, conditions, blocks)
    problem = Problem(
        *(graph.groups, graph.cost, settings.budget, settings.max_prune_ratio, settings.round_to),
        also=settings.also_budgets,
        price=found.ms,
    )
    least = narrowest_without(problem, [block.groups for block in blocks])
    problem.check_reach(least)  # before the expensive stations
    return found


def rounded(job: Job, graph: ModelGraph, settings: Settings) -> Settings:
    """Return the settings with the multiple that widths are to have, where it is to be measured.

    A run that goes on takes the one that was found before.
    """
    if settings.round_to != AUTO or settings.plan is not None:
        return settings

    def measured() -> dict[str, Any]:
        conditions = conditions_of(settings, device_of(graph.model))
        job.journal.stage(f"timing layers for the multiple of widths: {conditions}")
        with job.journal.timed("latency"):
            found = fast_multiple(graph, conditions)
        job.journal.note(_said(found, str(conditions)))
        return {"multiple": found.multiple}

    found: dict[str, Any] = once(job, "rounded", dict, measured)
    return replace(settings, round_to=int(found["multiple"]))


def _said(found: Rounding, conditions: str) -> str:
    """Say which multiple was taken, and why."""
    if not found.layers:
        return "--round-to auto: no layer that shrinks has 32 outputs, so widths are not rounded"
    if found.multiple == 1:
        return f"--round-to auto: any channel less saves time here ({conditions}): no rounding"
    time, share = found.saved[found.multiple]
    return (
        f"--round-to auto: widths are multiples of {found.multiple}, since {100 * share:.0f} % "
        f"fewer channels of {len(found.layers)} layers save {max(0, 100 * time):.0f} % of their "
        f"time here ({conditions})"
    )


@dataclass(frozen=True)
class Corrected:
    """A plan whose model takes about as much time as was asked, found by timing `rounds` plans."""

    plan: PruningPlan
    rounds: int


def to_time(
    job: Job,
    graph: ModelGraph,
    model: LatencyModel,
    problem: Problem,
    plan: PruningPlan,
    make: Making,
) -> Corrected:
    """Return a plan whose model, really pruned, takes as much time as is asked.

    The sum over layers is off by what layers do to one another (caches, memory). So the goal of the
    allocation is moved by the ratio of what was asked to what was measured, until they agree, and
    halved in where that leads out of what is known: kernels change with widths, and time jumps.

    Args:
        job: the run.
        graph: of the dense model.
        model: of its time.
        problem: that the plan was made for.
        plan: to begin with.
        make: the plan for a problem with another budget.
    """
    asked = aimed = 1 - problem.budget.prune_ratio
    low, high = 0.0, 1.0  # goals at which the model takes too little, and too much
    tried: dict[PruningPlan, float] = {}
    next_plan: PruningPlan | None = plan
    with job.journal.timed("latency"):
        for _ in range(ROUNDS):
            if next_plan is None:  # out of reach
                low = aimed
                aimed = (low + high) / 2
            else:
                if next_plan not in tried:
                    tried[next_plan] = share = _share(graph, model, next_plan, QUICK_PAIRS)
                    job.journal.stage(f"timed: {100 * share:.0f} % of the dense model's time")
                share = tried[next_plan]
                if abs(share - asked) <= CLOSE:
                    break
                low, high = (aimed, high) if share < asked else (low, aimed)
                step = aimed * asked / share
                aimed = step if low < step < high else (low + high) / 2
            if high - low <= CLOSE / 2:
                break
            next_plan = _made(make, problem, aimed)
    return Corrected(min(tried, key=lambda one: abs(tried[one] - asked)), len(tried))


def _made(make: Making, problem: Problem, share: float) -> PruningPlan | None:
    """Return the plan that leaves a share of the modelled time, None where none can."""
    try:
        return make(replace(problem, budget=Budget(problem.budget.target, 1 - share)))
    except BudgetError:
        return None


def timed(
    job: Job, graph: ModelGraph, model: LatencyModel, problem: Problem, found: Corrected
) -> PruningPlan:
    """Time a plan's model once more, tell of it, and return the plan with a note of a miss."""
    asked = 1 - problem.budget.prune_ratio
    with job.journal.timed("latency"):
        dense, pruned = _times(graph, model, found.plan, FINAL_PAIRS)
    modelled = model.ms({group.name: group.keep_width for group in found.plan.groups})
    job.journal.tell(
        latency=Timed(str(model.conditions), asked, dense, pruned, modelled, found.rounds)
    )
    return replace(
        found.plan, notes=(*found.plan.notes, *_notes(asked, pruned / dense, problem.also))
    )


def _share(graph: ModelGraph, model: LatencyModel, plan: PruningPlan, pairs: int) -> float:
    dense, pruned = _times(graph, model, plan, pairs)
    return pruned / dense


def _times(
    graph: ModelGraph, model: LatencyModel, plan: PruningPlan, pairs: int
) -> tuple[float, float]:
    conditions = model.conditions
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(conditions.batch, *graph.input_size, generator=generator)
    images = images.to(device_of(graph.model))
    dense, pruned = alternating([graph.model, graph.pruned(plan)], images, conditions, pairs)
    return dense, pruned


def _notes(asked: float, share: float, also: Sequence[Budget]) -> list[str]:
    if abs(share - asked) <= TOLERANCE:
        return []
    why = "what is left is not in the widths, or the machine was busy"
    if share < asked and also:
        why = f"the {' or '.join(budget.target for budget in also)} asked for take more"
    return [
        f"asked for {100 * asked:.0f} % of the dense model's time, {100 * share:.0f} % were "
        f"measured: {why}"
    ]


def price_of(model: LatencyModel | None) -> Callable[[Mapping[str, int]], float] | None:
    """Return what a problem's costs are in milliseconds, None where they are counted."""
    return None if model is None else model.ms
