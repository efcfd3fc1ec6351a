"""The dense and the pruned model under attack, on the same test images."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from robust_prune import evaluation
from robust_prune.evaluation import Attack
from robust_prune.pipeline.job import Job, State
from robust_prune.pipeline.keeping import keep, kept, readable_part
from robust_prune.pipeline.result import deliver
from robust_prune.types import Evaluation, Measurement, to_plain


def judge(job: Job, state: State) -> State:
    """Measure the dense and the pruned model on the same test images."""
    attack, n = job.settings.evaluation, len(job.test_images.labels)
    job.journal.stage(f"evaluation: {attack} on {n} test images, dense and pruned")
    with job.journal.timed("evaluate"):
        dense = evaluated(job, job.dense, attack, "dense")
        pruned = evaluated(job, state.model, attack, "pruned")
    return deliver(job, replace(state, dense=dense, pruned=pruned), "evaluated")


def evaluated(job: Job, model: nn.Module, attack: Attack, which: str) -> Evaluation:
    """Measure a model; each attack that a run before has finished is taken from its folder."""
    part = f"measured-{which}"
    found = job.processes.from_first(kept(job, part)) or {}
    done: list[Measurement] = []
    if found:
        with readable_part(job, part):
            done = [Measurement.from_plain(m) for m in found["measurements"]]
            if any(len(m.correct) != len(job.test_images.labels) for m in done):
                raise ValueError("verdicts on other images")

    def on_measured(measurement: Measurement) -> None:
        done.append(measurement)
        keep(job, part, {"measurements": [to_plain(m) for m in done]})

    return evaluation.evaluate(
        model,
        job.test_images,
        threat=job.settings.threat,
        attack=attack,
        seed=job.settings.seed,
        processes=job.processes,
        done=tuple(done),
        on_measured=on_measured,
        on_progress=job.events.evaluating,
    )
