"""What stations keep in a run's folder, so that a run goes on from the last one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn

from robust_prune.distributed import Processes
from robust_prune.errors import RunError, first_line
from robust_prune.finetune import EpochRecord
from robust_prune.pipeline.job import Job
from robust_prune.pipeline.run_folder import RunFolder, StateFile
from robust_prune.pipeline.settings import Events
from robust_prune.types import to_plain

T = TypeVar("T")


def once(job: Job, name: str, load: Callable[[Any], T], make: Callable[[], T]) -> T:
    """Return a part as a run before has kept it, else make it and keep it.

    The record of the run goes on from what it was when the part was kept.

    Args:
        job: whose folder keeps it, in the first process.
        name: of the part.
        load: the part from the plain data that were kept.
        make: the part by doing the work.
    """
    found = kept(job, name)
    if found is not None:
        with readable_part(job, name):
            part = load(found)
            job.journal.restore(found["journal"])
    else:
        part = make()
        keep(job, name, part)
    return part


def is_kept(job: Job, name: str) -> bool:
    """Return whether a part is there; never in other processes than the first."""
    return job.folder is not None and job.processes.first and job.folder.kept(name) is not None


def kept(job: Job, name: str) -> Any:
    """Return a part as plain data, None where it is not there; its seconds count."""
    if job.folder is None or not job.processes.first:
        return None
    found = job.folder.kept(name)
    if found is not None:
        with readable_part(job, name):
            job.journal.count_seconds(found["journal"])
    return found


@contextlib.contextmanager
def readable_part(job: Job, name: str) -> Iterator[None]:
    """Raise a RunError where a part that was kept is not what this version keeps."""
    place = job.folder.path / name if job.folder is not None else name
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise RunError(
            f"{place}.json: not a part of this run ({first_line(error)}); delete "
            "it to do its part again"
        ) from error


def keep(job: Job, name: str, part: Any) -> None:
    """Keep a part as plain data, with the record of the run as it is now."""
    if job.folder is not None and job.processes.first:
        plain = to_plain(part) or {}
        job.folder.keep(name, {**plain, "journal": job.journal.record.plain()})


def forget(job: Job, name: str) -> None:
    """Let a part that a run before has kept count no longer."""
    if job.folder is not None and job.processes.first:
        job.folder.forget(name)


def keep_weights(job: Job, name: str, model: nn.Module) -> None:
    """Keep the weights and statistics of a model."""
    state = saved(job, name)
    if state is not None:
        state.save({"model": model.state_dict()})


def load_weights_(job: Job, name: str, model: nn.Module) -> None:
    """Give a model the weights that were kept.

    Raises:
        RunError: there are none.
    """
    assert job.folder is not None
    file = job.folder.state(name)
    state = file.load()
    if state is None:
        raise RunError(f"{file.path} is missing; start anew")
    try:
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise RunError(
            f"{file.path}: not the weights of this run ({first_line(error)}); start anew"
        ) from None


def saved(job: Job, name: str) -> StateFile | None:
    """Return the file that keeps a state of tensors, None where nothing is kept."""
    return None if job.folder is None else job.folder.state(name)


def epochs_told(
    part: str, folder: RunFolder | None, processes: Processes, events: Events
) -> Callable[[EpochRecord], None]:
    """Return what listens to a training run: it keeps every epoch's line and passes it on."""

    def on_epoch(record: EpochRecord) -> None:
        if folder is not None and processes.first:
            folder.record(part, to_plain(record))
        if events.epoch is not None:
            events.epoch(record)

    return on_epoch
