"""A network trained adversarially, into a file."""

from __future__ import annotations

import torch
from torch import nn

from robust_prune.data import DataSplits
from robust_prune.distributed import ALONE, Processes
from robust_prune.errors import DataError
from robust_prune.finetune import EpochRecord, History, TrainingConfig, train_
from robust_prune.models import build_model
from robust_prune.modules import seeded
from robust_prune.pipeline.run_folder import RunFolder
from robust_prune.pipeline.settings import Events
from robust_prune.types import ModelSpec, to_plain


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

    def on_epoch(record: EpochRecord) -> None:
        if folder is not None and processes.first:
            folder.record("training", to_plain(record))
        if events.epoch is not None:
            events.epoch(record)

    history = train_(
        model,
        splits.train,
        splits.validation,
        config,
        teacher=teacher,
        processes=processes,
        saved=None if folder is None else folder.state("training"),
        on_progress=events.training,
        on_epoch=on_epoch,
    )
    return model, history
