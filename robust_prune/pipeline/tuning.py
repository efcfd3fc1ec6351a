"""Fine-tuning of what is left."""

from __future__ import annotations

from dataclasses import replace

from robust_prune.finetune import train_
from robust_prune.pipeline.job import Job, State
from robust_prune.pipeline.judging import evaluated
from robust_prune.pipeline.keeping import epochs_told, saved
from robust_prune.pipeline.result import deliver


def tune(job: Job, state: State, step: int) -> State:
    """Train the pruned model, in place; validation robustness decides which epoch stays.

    Raises:
        KeyboardInterrupt: the user stopped it; the best epoch so far was handed on.
    """
    settings, journal, splits = job.settings, job.journal, job.splits
    assert splits is not None
    assert splits.validation is not None
    config = settings.training(step)
    last = step == settings.prune_steps
    if last and settings.evaluation != "none":
        state = replace(state, before=evaluated(job, state.model, "pgd", "before", job.test_images))
    where = "" if settings.prune_steps == 1 else f" after step {step} of {settings.prune_steps}"
    journal.stage(f"fine-tuning{where}: {config.method}, {config.epochs} epochs")
    with journal.timed("fine-tune"):
        history = train_(
            state.model,
            splits.train,
            splits.validation,
            config,
            teacher=job.dense,
            processes=job.processes,
            saved=saved(job, f"tuned-{step}"),
            on_progress=job.events.training,
            on_epoch=epochs_told(f"step {step}", job.folder, job.processes, job.events),
        )
    for line in history.notes:
        journal.note(line)
    state = replace(state, history=history)
    if history.interrupted:
        deliver(job, state, "fine-tuning interrupted")
        raise KeyboardInterrupt
    if last:
        return deliver(job, state, "fine-tuned")
    journal.end_step(state.plans[-1], history)
    return state


def was_tuned(job: Job, step: int) -> bool:
    """Return whether a run before has begun to train after this pruning step."""
    state = saved(job, f"tuned-{step}")
    return state is not None and state.exists()
