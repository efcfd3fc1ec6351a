"""From what was measured to the plan, and how several pruning steps share out a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from robust_prune.allocation import (
    Evidence,
    Problem,
    allocations,
    best_composed,
    make_plan,
    narrowest_without,
    passes_of,
    width_after,
    without,
    worth_removing,
)
from robust_prune.errors import BudgetError
from robust_prune.graph import ModelGraph, is_large
from robust_prune.latency import LatencyModel
from robust_prune.options import shares
from robust_prune.pipeline.job import Job
from robust_prune.pipeline.measuring import Measured, Observed, note_branches
from robust_prune.pipeline.record import Candidate, Search
from robust_prune.pipeline.settings import Settings
from robust_prune.pipeline.timing import Corrected, price_of, timed, to_time
from robust_prune.registry import ALLOCATIONS
from robust_prune.repair import Repaired, fill_constants_, kept_rows, recalibrate_batchnorm_
from robust_prune.types import PruningPlan, Sensitivity

MOST_REASONS = 2  # in a message


@dataclass(frozen=True)
class Planned:
    """A plan, and the sensitivity that it was made with."""

    plan: PruningPlan
    sensitivity: Sensitivity

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Planned:
        """Build it from parsed JSON."""
        return cls(
            PruningPlan.from_plain(plain["plan"]), Sensitivity.from_plain(plain["sensitivity"])
        )


def plan(job: Job, observed: Observed, measured: Measured, settings: Settings) -> PruningPlan:
    """Return the plan made of what was measured, or the one to replay where it fits.

    Raises:
        BudgetError: the budget is out of reach.
        PlanError: the plan was made for another network.
    """
    with job.journal.timed("plan"):
        if settings.plan is None:
            return _made(job, observed, measured, settings)
        replayed = observed.graph.recounted(settings.plan)
        notes = tuple(dict.fromkeys((*replayed.notes, *observed.graph.uncounted)))
        job.journal.note(f"replayed plan {replayed.digest}")
        return replace(replayed, notes=notes)


def problem_of(
    graph: ModelGraph, settings: Settings, latency: LatencyModel | None = None
) -> Problem:
    """Return what an allocation has to solve.

    Raises:
        BudgetError: no group can be pruned; the message says why the first ones can't.
    """
    if not graph.groups:
        why = [f"{item.name}: {item.reason}" for item in graph.unprunable[:MOST_REASONS]]
        more = len(graph.unprunable) - len(why)
        why += [f"and {more} more, which robust-prune info lists"] if more > 0 else []
        raise BudgetError(f"the model has no prunable group ({'; '.join(why) or 'no layers'})")
    ratios = graph.ratios_by_group(shares(settings.ratio_of, "--ratio-of"))
    return Problem(
        graph.groups,
        graph.cost,
        settings.budget,
        settings.max_prune_ratio,
        settings.round_to,
        also=settings.also_budgets,
        price=price_of(latency),
        layers=graph.layers,
        fixed={
            g.name: width_after(g, ratio, settings.round_to) if ratio else g.width
            for g in graph.groups
            if (ratio := ratios.get(g.name)) is not None
        },
    )


def step_settings(settings: Settings, left: float, step: int) -> Settings | None:
    """Return the settings of one of several pruning steps, None where nothing is left to prune.

    What is left of the budget's target falls by the same factor in every step, and so does the
    least that a group may keep.

    Args:
        settings: of the whole; their budget says what is left after the last step.
        left: share of the dense model's target that the step starts from.
        step: from 1.
    """
    if settings.prune_steps == 1:
        return settings
    share = (1 - settings.budget.prune_ratio) ** (step / settings.prune_steps)
    if share >= left:
        return None
    return replace(
        settings,
        budget=replace(settings.budget, prune_ratio=1 - share / left),
        max_prune_ratio=1 - (1 - settings.max_prune_ratio) ** (1 / settings.prune_steps),
    )


def _made(job: Job, observed: Observed, measured: Measured, settings: Settings) -> PruningPlan:
    """Return the plan by the rule of the settings, or by curves the best of several."""
    graph, by_group = observed.graph, measured.sensitivity.of_groups()
    problem = problem_of(graph, settings, observed.latency)

    def plan_of(widths: Mapping[str, int], of: Problem = problem) -> PruningPlan:
        return make_plan(
            of,
            widths,
            {name: scores.tolist() for name, scores in measured.scores.items()},
            allocation=settings.allocation,
            score=settings.score,
            seed=settings.seed,
            input_size=job.input_size,
            mrs=by_group,
            unprunable=graph.unprunable,
            notes=graph.uncounted,
            ties=graph.ties,
            whole_heads=graph.whole_heads,
            blocks=[block.name for block in graph.empty_blocks(widths)],
        )

    evidence = Evidence(by_group, measured.curves, observed.effort.caps)

    def plans_of(of: Problem) -> list[PruningPlan]:
        return [plan_of(widths, of) for widths in allocations(settings.allocation, of, evidence)]

    rule_decides = not ALLOCATIONS.fact(settings.allocation, "curves")

    def best(plans: Sequence[PruningPlan]) -> PruningPlan:
        single = len(plans) == 1 and rule_decides
        return plans[0] if single else _best(job, observed, plans, settings)

    ways = _ways(problem, measured)
    if observed.latency is None:
        return best([plan for _, plans in _plans(ways, plans_of) for plan in plans])
    return _in_time(job, graph, observed.latency, ways, plans_of, best)


def _ways(problem: Problem, measured: Measured) -> list[Problem]:
    """Return the problem, and where blocks may go the one without those that are worth least."""
    if measured.blocks:
        problem.check_reach(narrowest_without(problem, measured.blocks))
    gone = worth_removing(problem, measured.curves, measured.blocks) if measured.blocks else []
    return [problem, *([without(problem, gone)] if gone else [])]


def _plans(
    ways: Sequence[Problem], plans_of: Callable[[Problem], list[PruningPlan]]
) -> list[tuple[Problem, list[PruningPlan]]]:
    """Return the plans of every way that reaches the budget; BudgetError where none does."""
    found: list[tuple[Problem, list[PruningPlan]]] = []
    for i, way in enumerate(ways):
        try:
            found.append((way, plans_of(way)))
        except BudgetError:
            if i == len(ways) - 1 and not found:
                raise
    return found


def _in_time(
    job: Job,
    graph: ModelGraph,
    model: LatencyModel,
    ways: Sequence[Problem],
    plans_of: Callable[[Problem], list[PruningPlan]],
    best: Callable[[Sequence[PruningPlan]], PruningPlan],
) -> PruningPlan:
    """Return the plan that takes the time asked for: by milliseconds saved, or by multiply-adds.

    Steps priced in milliseconds lean on the errors of the layers' sum. Both ways are gone, each
    model is timed and corrected, and the better one at that time is taken.
    """
    found: dict[PruningPlan, Corrected] = {}
    seen: list[PruningPlan] = []
    both = [each for way in ways for each in (way, replace(way, by_macs=True))]
    for way, plans in _plans(both, plans_of):
        fresh = [plan for plan in plans if plan not in seen]
        seen += fresh
        if not fresh:
            continue  # a rule without steps to price
        start = best(fresh)

        def again(of: Problem, place: int = plans.index(start)) -> PruningPlan:
            return (made := plans_of(of))[min(place, len(made) - 1)]

        corrected = to_time(job, graph, model, way, start, again)
        found[corrected.plan] = corrected
    chosen = next(iter(found)) if len(found) == 1 else best(list(found))
    return timed(job, graph, model, ways[0], found[chosen])


def _best(
    job: Job, observed: Observed, plans: Sequence[PruningPlan], settings: Settings
) -> PruningPlan:
    """Return the plan whose model, really pruned and repaired, withstands attacks best."""
    graph, splits, effort = observed.graph, observed.splits, observed.effort
    job.journal.stage(f"attacking {len(plans)} candidates")
    few, many = effort.search_images
    n = max(few, min(many, effort.passes // (passes_of(effort.search_steps) * len(plans))))
    images, labels = observed.images[:n], observed.labels[:n]

    latest: list[Repaired] = []

    def repair_(pruned: nn.Module, plan: PruningPlan) -> None:
        note_branches(observed, plan)
        rows = kept_rows(graph, plan)
        fill_constants_(pruned, observed.branches, rows)
        if observed.reconstruction is not None:
            fits = observed.reconstruction.apply_(pruned, rows)
            if not is_large(graph.model):  # then rather fitted twice than held twice
                latest[:] = [Repaired.of(pruned, fits)]
        if splits.in_distribution:
            batches = splits.train.batches(
                64, seed=settings.seed, limit=2 * len(labels), verdicts=False
            )
            recalibrate_batchnorm_(pruned, batches)

    def keep(plan: PruningPlan) -> None:
        observed.repaired.clear()
        if latest:
            observed.repaired[plan.digest] = latest[0]

    best, losses = best_composed(
        graph,
        plans,
        images,
        labels,
        threat=settings.threat,
        steps=effort.search_steps,
        seed=settings.seed,
        batch_size=min(effort.batch_size, settings.batch_size),
        stand_in=effort.stand_in,
        repair_=repair_,
        on_best=keep,
    )
    candidates = tuple(
        Candidate(loss, plan.pruned.params, tuple(g.keep_width for g in plan.groups))
        for loss, plan in zip(losses, plans, strict=True)
    )
    job.journal.tell(search=Search(f"PGD-{effort.search_steps}", len(labels), best, candidates))
    return plans[best]
