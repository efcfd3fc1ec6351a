"""A network trained adversarially, and the file it is written to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_prune.data import DataSplits
from robust_prune.distributed import ALONE, Processes
from robust_prune.errors import DataError, Interrupted
from robust_prune.finetune import History, TrainingConfig, train_
from robust_prune.models import build_model, save
from robust_prune.modules import ImageModel, seeded
from robust_prune.pipeline.describing import asked_to_train, without_times
from robust_prune.pipeline.holding import held_for_all
from robust_prune.pipeline.keeping import epochs_told
from robust_prune.pipeline.record import plain_history
from robust_prune.pipeline.run_folder import RunFolder
from robust_prune.pipeline.settings import Events
from robust_prune.types import ModelSpec, to_plain

PART = "training"  # what the run's folder calls it


@dataclass(frozen=True)
class TrainResult:
    """The trained network, how it was trained, and the record that its file holds."""

    model: nn.Module
    history: History
    record: dict[str, Any]


def train_model(
    spec: ModelSpec,
    splits: DataSplits,
    config: TrainingConfig,
    *,
    device: torch.device | str = "cpu",
    pretrained: bool = False,
    start: nn.Module | None = None,
    teacher: nn.Module | None = None,
    events: Events | None = None,
    folder: RunFolder | None = None,
    processes: Processes = ALONE,
) -> tuple[nn.Module, History]:
    """Train a network adversarially, from `start` or from the builder's weights.

    With `folder` the state of the run is kept there, and taken up where there is one.
    """
    events = events or Events()
    if start is None:
        with seeded(config.seed):
            start = build_model(spec, pretrained=pretrained)
    model = start.to(device)
    if splits.validation is None:
        raise DataError("too few images to keep some back for validation")
    history = train_(
        model,
        splits.train,
        splits.validation,
        config,
        teacher=teacher,
        processes=processes,
        saved=None if folder is None else folder.state(PART),
        on_progress=events.training,
        on_epoch=epochs_told(PART, folder, processes, events),
    )
    return model, history


def train_file(
    spec: ModelSpec,
    splits: DataSplits,
    config: TrainingConfig,
    target: Path,
    events: Events,
    *,
    arguments: Mapping[str, Any] | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    pretrained: bool = False,
    start: nn.Module | None = None,
    teacher: nn.Module | None = None,
    processes: Processes = ALONE,
) -> TrainResult:
    """Train a network and write it to `target`, whole or not at all.

    Where `arguments` are given, `run_path(target)` keeps the state of the run, and them for whoever
    goes on with it, until the run is complete. A run that the user stops writes its best epoch,
    and `history.interrupted` says so.

    Raises:
        Interrupted: the user stopped the run before its first epoch ended; nothing is written.
        RunError: `resume`, and the run there is another one.
    """
    kept = arguments is not None and processes.first
    folder = RunFolder(run_path(target)) if kept else None

    def begin(folder: RunFolder) -> None:
        asked = asked_to_train(splits, start, teacher, processes)
        folder.open({**asked, "arguments": dict(arguments or {})}, resume=resume)

    with held_for_all(folder, processes, begin):
        with _forgetting(folder):
            model, history = train_model(
                spec,
                splits,
                config,
                device=device,
                pretrained=pretrained,
                start=start,
                teacher=teacher,
                events=events,
                folder=folder,
                processes=processes,
            )
        if isinstance(model, ImageModel):
            model.spec = spec
        for line in history.notes:
            events.note(line)
        if history.interrupted and len(history.epochs) < 2:
            raise Interrupted(
                f"stopped before the first epoch ended{go_on_text(target, arguments)}"
            )
        record = {
            "data": dict(splits.source),
            "threat": to_plain(config.threat),
            "training": plain_history(history),
            "status": "trained" if not history.interrupted else "training interrupted",
        }
        if processes.first:
            save(model, target, without_times(record))
        if folder is not None and not history.interrupted:
            folder.clear()
    return TrainResult(model, history, record)


def run_path(target: Path) -> Path:
    """Return where the state of a run is kept that writes this file."""
    return target.with_name(target.name + ".run")


def go_on_text(target: Path, arguments: Mapping[str, Any] | None) -> str:
    """Return how the command line goes on with a run that was stopped, empty where it can't."""
    if arguments is None:
        return ""
    return f"; robust-prune train --resume {run_path(target)} goes on"


@contextlib.contextmanager
def _forgetting(folder: RunFolder | None) -> Iterator[None]:
    """Leave no run behind that failed before it had a state to go on from."""
    try:
        yield
    except Exception:
        if folder is not None and not folder.state(PART).exists():
            folder.clear()
        raise
