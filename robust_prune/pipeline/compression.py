"""The whole run: measure, plan, cut, prove, repair, tune, judge."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace

import torch
from torch import nn

from robust_prune.allocation import allocate_evenly, narrowest_without
from robust_prune.data import DataSplits
from robust_prune.distributed import ALONE, Processes
from robust_prune.errors import BudgetError
from robust_prune.graph import ModelGraph
from robust_prune.modules import copied, images_in_free_memory, own_, seeded, telling_of_memory
from robust_prune.pipeline.drop_search import plan_within_drop
from robust_prune.pipeline.job import Cut, Job, State, begin
from robust_prune.pipeline.judging import judge
from robust_prune.pipeline.keeping import forget, is_kept, keep_weights, load_weights_, once
from robust_prune.pipeline.measuring import (
    Observed,
    graph_of,
    measure,
    note_branches,
    observe,
)
from robust_prune.pipeline.planning import Planned, plan, problem_of, step_settings
from robust_prune.pipeline.repairing import prove, repair_
from robust_prune.pipeline.result import deliver
from robust_prune.pipeline.run_folder import RunFolder
from robust_prune.pipeline.settings import CompressResult, Events, Settings
from robust_prune.pipeline.timing import rounded
from robust_prune.pipeline.tuning import tune, was_tuned
from robust_prune.repair import kept_rows
from robust_prune.types import PruningPlan


def run(
    model: nn.Module,
    splits: DataSplits | None,
    settings: Settings,
    events: Events | None = None,
    *,
    folder: RunFolder | None = None,
    processes: Processes = ALONE,
) -> CompressResult:
    """Do what `settings` say to a copy of `model`; `splits` None means synthetic calibration.

    With `folder` every station keeps what it has done there, and takes up what is there already.
    """
    with seeded(settings.seed), torch.enable_grad(), contextlib.ExitStack() as stack:
        job, state = begin(model, splits, settings, events or Events(), folder, processes)
        fit = functools.partial(images_in_free_memory, job.dense, torch.zeros(1, *job.input_size))
        stack.enter_context(telling_of_memory(job.journal.note, fit))
        for step in range(1, settings.prune_steps + 1):
            state = prune(job, state, step)
            own_(state.model, job.dense)  # where a step prunes nothing, too
            if settings.finetune is not None:
                state = tune(job, state, step)
        if settings.evaluation != "none":
            state = judge(job, state)
    assert state.result is not None
    return state.result


def prune(job: Job, state: State, step: int) -> State:
    """Let the first process plan and prune, and give plan and weights to the others.

    Args:
        job: the run.
        state: whose model is pruned in place.
        step: which of the pruning steps, from 1.
    """
    last = step == job.settings.prune_steps
    settings = step_settings(job.settings, state.left(job), step)
    if settings is None:
        job.journal.note(f"step {step} prunes nothing: the one before has gone that far")
    else:
        job.journal.begin_step()
        cut = job.processes.on_first(lambda: prune_first(job, state.model, settings, step))
        if not job.processes.first:
            graph_of(state.model, job.input_size, settings).apply_(cut.plan)
            own_(state.model, job.dense)
        job.processes.share_(state.model)
        state = state.after(cut)
        if not last and settings.finetune is None:
            job.journal.end_step(state.plans[-1], None)
    if last and not was_tuned(job, step):  # else the file that is there is the better one
        state = deliver(job, state, "pruned")
    return state


def prune_first(job: Job, model: nn.Module, settings: Settings, step: int) -> Cut:
    """Measure, plan, cut and repair, each once: a run before may have done it."""
    where = f" in step {step} of {settings.prune_steps}" if settings.prune_steps > 1 else ""
    planning, pruning = f"planned-{step}", f"pruned-{step}"
    with job.journal.timed("graph"):
        graph = graph_of(model, job.input_size, settings)
    job.journal.tell(reachable=graph.reachable)
    settings = within_reach(job, graph, rounded(job, graph, settings), step)

    @functools.cache  # for the plan and for the repair, whichever is still to be done
    def observed() -> Observed:
        return observe(job, graph, settings, quiet=is_kept(job, planning))

    def plan_anew() -> Planned:
        forget(job, pruning)  # what another plan has cut
        measured = measure(job, observed(), settings)
        making = plan if settings.max_drop is None else plan_within_drop
        return Planned(making(job, observed(), measured, settings), measured.sensitivity)

    def cut_anew_() -> None:
        cut_(job, observed(), planned.plan, settings, where)
        keep_weights(job, pruning, model)

    def cut_again_(_: object) -> None:
        job.journal.stage(f"pruned as before{where}: plan {planned.plan.digest}")
        graph.apply_(planned.plan)
        own_(model, job.dense)
        load_weights_(job, pruning, model)

    planned = once(job, planning, Planned.from_plain, plan_anew)
    names = graph.names_after(planned.plan)
    once(job, pruning, cut_again_, cut_anew_)
    return Cut(planned.plan, planned.sensitivity, names)


def within_reach(job: Job, graph: ModelGraph, settings: Settings, step: int) -> Settings:
    """Return the settings of a step, with a wider limit where its own doesn't reach the budget.

    What can't be done fails here, before the expensive stations. The least that a group may keep
    falls by the same factor in every step; a step after some that took less of some groups may
    need more than that.

    Raises:
        BudgetError: the whole budget is out of reach; said before the first step.
        PlanError: the plan was made for another network.
    """
    if settings.plan is not None:
        graph.check(settings.plan)
    if settings.plan is not None or settings.latency:  # a latency is measured first
        return settings
    asked = job.settings
    whole = replace(settings, budget=asked.budget, max_prune_ratio=asked.max_prune_ratio)
    if step == 1:
        check_reach(graph, whole)
    if settings == whole:
        return settings
    try:
        check_reach(graph, settings)
    except BudgetError:
        most = asked.max_prune_ratio
        job.journal.note(f"step {step} takes up to {100 * most:g} % of a group to reach its budget")
        return replace(settings, max_prune_ratio=most)
    return settings


def check_reach(graph: ModelGraph, settings: Settings) -> None:
    """Raise BudgetError where not enough can go."""
    problem = problem_of(graph, settings)
    if settings.whole_blocks:
        problem.check_reach(narrowest_without(problem, [block.groups for block in graph.blocks]))
    else:
        allocate_evenly(problem)


def cut_(job: Job, observed: Observed, plan: PruningPlan, settings: Settings, where: str) -> None:
    """Remove channels from the observed model, prove that right, and repair what is left."""
    graph, model, journal = observed.graph, observed.graph.model, job.journal
    whole = copied(model) if settings.prune_steps > 1 else job.dense
    rows = kept_rows(graph, plan)
    note_branches(observed, plan)
    journal.stage(f"pruning {len(plan.groups)} groups{where}")
    with journal.timed("prune"):
        graph.apply_(plan)
        own_(model, job.dense)
    prove(job, whole, model, plan)
    repair_(job, model, observed, plan, rows, settings)
    if plan.blocks:
        journal.note(f"residual blocks that went whole: {', '.join(plan.blocks)}")
    for line in plan.notes:
        journal.note(line)
