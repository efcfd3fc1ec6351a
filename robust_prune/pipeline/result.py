"""What a compression hands on: the model, the plan, and the report as plain data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from robust_prune import report
from robust_prune.models import library_versions
from robust_prune.modules import device_of
from robust_prune.pipeline.describing import describe_model, hardware, plain_settings
from robust_prune.pipeline.job import Job, State
from robust_prune.pipeline.record import plain_history
from robust_prune.pipeline.settings import CompressResult
from robust_prune.types import to_plain, without_nan


def deliver(job: Job, state: State, status: str) -> State:
    """Hand the result on, so that it can be written whatever comes later."""
    result = CompressResult(
        model=state.model,
        plan=state.plan(job),
        report=report_of(job, state, status),
        sensitivity=state.sensitivity,
        history=state.history,
        dense=state.dense,
        pruned=state.pruned,
    )
    job.events.saveable(result)
    return replace(state, result=result)


def report_of(job: Job, state: State, status: str) -> dict[str, Any]:
    """Return the report of a compression as far as it has come, as plain data."""
    settings, splits, record = job.settings, job.splits, job.journal.record
    plan, dense, pruned = state.plan(job), state.dense, state.pruned
    plain: dict[str, Any] = to_plain(
        {
            **record.pruned.plain(),
            "schema": report.SCHEMA,
            "status": status,
            "model": describe_model(state.model),
            "threat": settings.threat,
            "seed": settings.seed,
            "processes": job.processes.size,
            "data": dict(splits.source) if splits and splits.labelled else None,
            "data_name": splits.name if splits else "stand-in photographs",
            "settings": plain_settings(settings),
            "sensitivity": state.sensitivity,
            "plan": plan,
            "plan_digest": plan.digest,
            "cost": {"dense": plan.dense, "pruned": plan.pruned},
            "finetune": plain_history(state.history),
            "steps": without_nan([step.plain() for step in record.steps]),
            "evaluation": {
                "dense": dense,
                "pruned_before_finetuning": state.before,
                "pruned": pruned,
                "paired": dense.compare(pruned) if dense and pruned else {},
            },
            "notes": record.notes,
            "seconds": {name: round(value, 3) for name, value in record.seconds.items()},
            "versions": library_versions(),
            "hardware": hardware(device_of(state.model)),
        }
    )
    return plain
