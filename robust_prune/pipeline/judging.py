"""The dense and the pruned model under attack, on the same test images."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from robust_prune import evaluation
from robust_prune.evaluation import Attack, TestImages
from robust_prune.options import AUTO
from robust_prune.pipeline.job import Job, State
from robust_prune.pipeline.keeping import keep, kept, readable_part
from robust_prune.pipeline.result import deliver
from robust_prune.types import Evaluation, Measurement, to_plain


def judge(job: Job, state: State) -> State:
    """Measure the dense and the pruned model on the same test images."""
    settings, splits = job.settings, job.splits
    assert splits is not None
    assert splits.test is not None
    auto = settings.n_eval == AUTO
    n = "as many" if auto else f"{len(job.test_images.labels)}"
    wanted = f" as tell their difference to {settings.margin:g} points" if auto else ""
    job.journal.stage(
        f"evaluation: {settings.evaluation} on {n} test images{wanted}, dense and pruned"
    )

    def measure(test: TestImages) -> list[Evaluation]:
        models = {"dense": job.dense, "pruned": state.model}
        return [evaluated(job, model, settings.evaluation, w, test) for w, model in models.items()]

    with job.journal.timed("evaluate"):
        if auto:
            dense, pruned = evaluation.evaluate_in_rounds(
                splits.test, measure, margin=settings.margin, seed=settings.seed
            )
            if wide := evaluation.too_wide((dense, pruned), settings.margin):
                job.journal.note(wide)
        else:
            dense, pruned = measure(job.test_images)
    return deliver(job, replace(state, dense=dense, pruned=pruned), "evaluated")


def evaluated(
    job: Job, model: nn.Module, attack: Attack, which: str, test: TestImages
) -> Evaluation:
    """Measure a model; each attack that a run before has finished is taken from its folder."""
    part = f"measured-{which}" + (f"-{test.begin}" if test.begin else "")
    found = job.processes.from_first(kept(job, part)) or {}
    done: list[Measurement] = []
    if found:
        with readable_part(job, part):
            done = [Measurement.from_plain(m) for m in found["measurements"]]
            if any(len(m.correct) != len(test.labels) for m in done):
                raise ValueError("verdicts on other images")

    def on_measured(measurement: Measurement) -> None:
        done.append(measurement)
        keep(job, part, {"measurements": [to_plain(m) for m in done]})

    return evaluation.evaluate(
        model,
        test,
        threat=job.settings.threat,
        attack=attack,
        seed=job.settings.seed,
        processes=job.processes,
        done=tuple(done),
        on_measured=on_measured,
        on_progress=job.events.evaluating,
    )
