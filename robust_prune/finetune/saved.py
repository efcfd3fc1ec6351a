"""Where a training run keeps its state, and what a state must be to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Protocol

import msgspec
import torch
from torch import Tensor, nn

from robust_prune.finetune.config import EpochRecord, TrainingConfig

# what taking up a state raises that does not fit, msgspec's and torch's own errors among them
STATE_ERRORS = (
    *(LookupError, TypeError, ValueError),
    *(RuntimeError, AttributeError, ArithmeticError),
)
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class Saved(Protocol):
    """Where a run keeps its state; `load` gives what `save` was last given."""

    def load(self) -> dict[str, Any] | None:
        """Return the state to go on from, None for a new run."""

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state, whole or not at all."""

    def due(self) -> bool:
        """Whether so much time has passed that a state should be saved within an epoch."""


class _State(msgspec.Struct, forbid_unknown_fields=True):
    """What `_Run` saves; tensors and the generators' states are checked where they are used."""

    epoch: Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
    batch: Count
    step: Count
    loss_sum: float
    seen: Count
    notes: list[str]
    best_epoch: Count
    peak_epoch: Count
    switched: Count
    stopped: bool
    records: Annotated[list[EpochRecord], msgspec.Meta(min_length=1)]
    model: dict[str, Any]
    best: dict[str, Any]
    average: dict[str, Any] | None
    optimizer: dict[str, Any]
    random: dict[str, Any]
    peak: Any


def check_state(
    state: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    images: int,
) -> None:
    """Check a state that was read before anything is taken from it.

    Args:
        state: as it was read.
        model: to be trained; weights must have its names and shapes.
        optimizer: a new one of this run; a saved one must have its settings, by name and type.
        config: of the run.
        images: how many it validates on.

    Raises:
        ValueError: a field has another type, range or shape; the message says which.
    """
    found = msgspec.convert(dict(state), _State)
    if [record.epoch for record in found.records] != list(range(len(found.records))):
        raise ValueError("its epochs are not numbered from 0")
    last = len(found.records) - 1
    if (
        max(found.best_epoch, found.peak_epoch, found.switched) > last
        or found.epoch > config.epochs + 1
    ):
        raise ValueError(f"it names an epoch that it does not hold; the last is {last}")
    peak = found.peak
    if not isinstance(peak, Tensor) or peak.shape != (images,) or peak.dtype != torch.bool:
        raise ValueError(f"its verdicts are not {images} booleans")
    if (found.average is not None) != bool(config.ema):
        raise ValueError("only one of the runs averages weights")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for which in (found.model, found.best, found.average):
        if which is not None and shapes != {n: getattr(t, "shape", None) for n, t in which.items()}:
            raise ValueError("its weights have other names or shapes than the model")
    _check_optimizer(found.optimizer, optimizer.state_dict())


def _check_optimizer(found: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    groups = found.get("param_groups")
    if not isinstance(groups, list) or not isinstance(found.get("state"), dict):
        raise ValueError("its optimizer has no settings")
    kinds = [{name: type(value) for name, value in group.items()} for group in groups]
    if kinds != [{name: type(value) for name, value in g.items()} for g in new["param_groups"]]:
        raise ValueError("its optimizer has other settings than this run's")
