"""What a training run does, and what it tells: frozen data."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

from robust_prune.errors import UsageError
from robust_prune.finetune.attack import Method
from robust_prune.options import TRAINING_RATE, RunOptions, TrainingOptions, other_default
from robust_prune.types import ThreatModel


@dataclass(frozen=True)
class TrainingConfig(TrainingOptions):
    """What a run does; everything that its result depends on beside the model and the data.

    The options of training (`robust_prune.options.TrainingOptions`), and:

    Attributes:
        method: name, `package.module:function`, or a function (model, images, labels, attack) ->
            loss; `+awp` after a name disturbs the weights too.
        epochs: passes over the training images, 1 or more.
        threat: norm and eps of the attacks.
        seed: of everything random.
    """

    method: str | Method
    epochs: int
    threat: ThreatModel
    seed: int = RunOptions.seed
    _: KW_ONLY
    lr: float = other_default(TrainingOptions, "lr", TRAINING_RATE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1:
            raise UsageError(f"epochs must be at least 1, not {self.epochs}; or use no fine-tuning")

    def lr_at(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0, of `steps` in all."""
        warmup = 0.0 if self.schedule == "cosine" else self.warmup
        done = step / max(steps, 1)
        rising = ((step + 1) / max(steps, 1)) / warmup if warmup > 0 else 1.0
        if self.schedule == "constant":
            return self.lr * min(rising, 1.0)
        falling = 0.5 * (1 + math.cos(math.pi * max(0.0, done - warmup) / (1 - warmup)))
        return self.lr * min(rising, 1.0) * falling

    def threat_at(self, epoch: int) -> ThreatModel:
        """Return the threat model of an epoch, counted from 1: eps rises over `eps_warmup`."""
        adversarial = epoch - self.clean_epochs
        if adversarial > self.eps_warmup:
            return self.threat
        share = max(adversarial, 1) / (self.eps_warmup + 1)
        return ThreatModel(self.threat.norm, self.threat.eps * share)


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for a progress bar; accuracies are those of the last validation."""

    epoch: int
    epochs: int
    images: int
    total: int
    loss: float
    images_per_second: float
    seconds_left: float
    clean: float = math.nan
    robust: float = math.nan


@dataclass(frozen=True)
class EpochRecord:
    """One epoch's figures; accuracies on validation images, in [0, 1].

    `robust` is PGD accuracy, `single_step` FGSM accuracy: far above `robust`, it tells
    catastrophic overfitting. `loss` is NaN before training.
    """

    epoch: int
    loss: float
    clean: float
    robust: float
    seconds: float
    single_step: float = math.nan
    lr: float = 0.0
    images_per_second: float = 0.0


@dataclass(frozen=True)
class History:
    """A whole run: its epochs, and which one's weights the model now has.

    `how` says in words what decided how attacks and passes were computed on this device.
    """

    method: str
    epochs: tuple[EpochRecord, ...]
    best_epoch: int
    validation: str
    interrupted: bool = False
    notes: tuple[str, ...] = ()
    how: str = ""
