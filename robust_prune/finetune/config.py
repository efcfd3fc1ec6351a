"""What a training run does, and what it tells: frozen data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from robust_prune.errors import UsageError
from robust_prune.finetune.attack import BatchNormMode, Method
from robust_prune.types import ThreatModel

Schedule = Literal["one-cycle", "cosine", "constant"]
OnCollapse = Literal["switch", "stop", "continue"]


@dataclass(frozen=True)
class TrainingConfig:
    """What a run does; everything that its result depends on beside the model and the data.

    Attributes:
        method: name, `package.module:function`, or a function (model, images, labels, attack) ->
            loss; `+awp` after a name disturbs the weights too.
        epochs: passes over the training images.
        threat: norm and eps of the attacks.
        attack_steps: PGD steps of the training attack.
        batch_size: images of one step, of all processes together.
        optimizer: `sgd`, `adamw`, or another name of timm's factory.
        lr: peak learning rate.
        momentum: of SGD, with Nesterov's correction.
        weight_decay: of weights with two dimensions or more; biases and norms have none.
        schedule: `one-cycle` rises and falls to zero as a cosine, `cosine` only falls, `constant`
            rises and stays, which suits `ema`.
        warmup: share of all steps that the linear rise takes, in [0, 1).
        clip_grad: largest norm of the gradient; None for no limit.
        ema: decay of the weights' running average, which is then what is validated and kept; 0 for
            none.
        label_smoothing: in [0, 1), of cross-entropies.
        clean_epochs: epochs on clean images first.
        eps_warmup: epochs, after the clean ones, over which eps rises linearly to the threat's.
        attack_batchnorm: what batch norms use in training attacks: `eval` running statistics,
            `train` those of the batch.
        validation_images: how many to select the epoch that is kept by.
        augment: random crops and flips.
        cutout: side of a square, in pixels, that is set to zero at a random place; 0 for none.
        randaugment: torchvision's RandAugment on every image.
        amp: forward passes in bfloat16 where torch's autocast does; weights, loss and validation
            stay in float32. None: where the device is a GPU that has it.
        attack_amp: training attacks in bfloat16, whatever `amp` says; None: where the device
            computes in it natively. Attacks stay as strong and are up to twice as fast.
        channels_last: on a GPU, the layout that its tensor cores like. Refused on a CPU, where
            torch's convolutions can corrupt memory in it.
        fold_batchnorm: attacks in eval mode go through a copy with batch norms folded into
            convolutions, where the logits stay the same.
        patience: stop after this many epochs without a better one; None for never.
        on_collapse: what to do about catastrophic overfitting: `switch` to pgd-at from the best
            epoch, `stop`, or `continue`. It is always said.
        seed: of everything random.
    """

    method: str | Method
    epochs: int
    threat: ThreatModel
    attack_steps: int = 7
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "one-cycle"
    warmup: float = 0.1
    clip_grad: float | None = None
    ema: float = 0.0
    label_smoothing: float = 0.0
    clean_epochs: int = 0
    eps_warmup: int = 0
    attack_batchnorm: BatchNormMode = "eval"
    validation_images: int = 512
    augment: bool = True
    cutout: int = 0
    randaugment: bool = False
    amp: bool | None = None
    attack_amp: bool | None = None
    channels_last: bool = False
    fold_batchnorm: bool = True
    patience: int | None = None
    on_collapse: OnCollapse = "switch"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UsageError(f"epochs must be at least 1, not {self.epochs}; or use no fine-tuning")
        if self.batch_size < 2 or self.attack_steps < 1 or not self.lr > 0:
            raise UsageError(
                f"batch size {self.batch_size} must be at least 2, attack steps "
                f"{self.attack_steps} at least 1 and the learning rate {self.lr:g} positive"
            )
        patience = 1 if self.patience is None else self.patience
        clip = 1.0 if self.clip_grad is None else self.clip_grad
        limits = (
            ("warmup", self.warmup, 0 <= self.warmup < 1, "in [0, 1)"),
            ("EMA decay", self.ema, 0 <= self.ema < 1, "in [0, 1); 0.999 is usual, 0 for none"),
            ("label smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("weight decay", self.weight_decay, self.weight_decay >= 0, "0 or more"),
            ("cutout", self.cutout, self.cutout >= 0, "0 or more pixels"),
            ("clean epochs", self.clean_epochs, self.clean_epochs >= 0, "0 or more"),
            ("eps warm-up", self.eps_warmup, self.eps_warmup >= 0, "0 or more epochs"),
            ("validation images", self.validation_images, self.validation_images >= 1, "1 or more"),
            ("patience", patience, patience >= 1, "1 epoch or more"),
            ("gradient norm", clip, clip > 0, "positive"),
        )
        for what, value, fits, limit in limits:
            if not fits:
                raise UsageError(f"{what} {value:g} must be {limit}")
        choices = (
            ("schedule", self.schedule, get_args(Schedule)),
            ("on-collapse", self.on_collapse, get_args(OnCollapse)),
            ("batch norm in attacks", self.attack_batchnorm, get_args(BatchNormMode)),
        )
        for what, name, names in choices:
            if name not in names:
                raise UsageError(f"{what} {name!r} is not known; use one of {', '.join(names)}")

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
