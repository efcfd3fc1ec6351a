"""The training loop: SGD, a one-cycle schedule, and the best checkpoint by validation."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robust_prune.data import Split
from robust_prune.errors import TrainingError, UsageError
from robust_prune.evaluation import pgd_correct, predict
from robust_prune.finetune import Method, resolve
from robust_prune.finetune.attack import Attack
from robust_prune.modules import check_outputs, device_of, make_contiguous_, seeded
from robust_prune.types import ThreatModel

VALIDATION_STEPS = 10


@dataclass(frozen=True)
class TrainingConfig:
    """What a run does; everything that its result depends on beside the model and the data.

    `amp` runs forward passes in bfloat16 where torch's autocast does; weights, loss and
    validation stay in float32.
    """

    method: str | Method
    epochs: int
    threat: ThreatModel
    steps: int = 7
    batch_size: int = 128
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    clean_epochs: int = 0
    validation_images: int = 512
    augment: bool = True
    amp: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UsageError(f"epochs must be at least 1, not {self.epochs}; or use no fine-tuning")
        if self.batch_size < 2 or self.steps < 1 or not self.lr > 0:
            raise UsageError(
                f"batch size {self.batch_size} must be at least 2, attack steps {self.steps} at "
                f"least 1 and the learning rate {self.lr:g} positive"
            )


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for a progress bar."""

    epoch: int
    epochs: int
    images: int
    total: int
    loss: float
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class EpochRecord:
    """One epoch's figures; accuracies on validation images, in [0, 1]."""

    epoch: int
    loss: float
    clean: float
    robust: float
    seconds: float


@dataclass(frozen=True)
class History:
    """A whole run: its epochs, and which one's weights the model now has."""

    method: str
    epochs: tuple[EpochRecord, ...]
    best_epoch: int
    validation: str
    interrupted: bool = False
    notes: tuple[str, ...] = ()


def train_(
    model: nn.Module,
    training: Split,
    validation: Split,
    config: TrainingConfig,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> History:
    """Train in place; the model ends with the epoch that was most robust on validation images.

    Epoch 0, the model as it came, is a candidate too. KeyboardInterrupt ends the run early with
    the best epoch so far, and `interrupted` says so.

    Args:
        model: takes images in [0, 1]; ends in eval mode.
        training: images to learn from.
        validation: images to select by; never test images.
        config: the run.
        on_progress: called after every batch.
        on_epoch: called after every epoch, 0 included.

    Raises:
        TrainingError: the loss is not finite; the model has its best weights so far.
    """
    name, method = resolve(config.method)
    images, labels = validation.take(min(config.validation_images, len(validation)), config.seed)
    check_outputs(model, images, labels)
    make_contiguous_(model)
    run = _Run(model, method, training, config, on_progress)
    records: list[EpochRecord] = []
    best: tuple[tuple[float, float], int, dict[str, Any]] | None = None
    interrupted = False
    try:
        with seeded(config.seed):
            for epoch in range(config.epochs + 1):
                start = time.perf_counter()
                loss = run.epoch(epoch) if epoch else math.nan
                record = _validate(model, images, labels, config, epoch, loss, start)
                records.append(record)
                rank = (record.robust, record.clean)
                if best is None or rank > best[0]:
                    best = rank, epoch, copy.deepcopy(model.state_dict())
                if on_epoch is not None:
                    on_epoch(record)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if best is not None:
            model.load_state_dict(best[2])
        model.eval()
        for parameter in model.parameters():
            parameter.grad = None
    return History(
        method=name,
        epochs=tuple(records),
        best_epoch=best[1] if best else 0,
        validation=f"PGD-{VALIDATION_STEPS} on {len(labels)} validation images",
        interrupted=interrupted,
        notes=_collapses([r for r in records if not 0 < r.epoch <= config.clean_epochs]),
    )


def _collapses(records: list[EpochRecord]) -> tuple[str, ...]:
    """Tell catastrophic overfitting: robustness to PGD breaks down, clean accuracy does not.

    Source: Wong et al., "Fast is better than free", ICLR 2020, Sec. 5.
    """
    for before, after in itertools.pairwise(records):
        if (
            before.robust >= 0.1
            and after.robust < 0.5 * before.robust
            and after.clean >= before.clean - 0.02
        ):
            return (
                f"catastrophic overfitting in epoch {after.epoch}: robust {100 * before.robust:.1f}"
                f" -> {100 * after.robust:.1f} % while clean {100 * before.clean:.1f} -> "
                f"{100 * after.clean:.1f} %; the best epoch before was kept, a multi-step method "
                "(pgd-at, trades) avoids it",
            )
    return ()


class _Run:
    """The optimizer and its schedule, epoch by epoch."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        training: Split,
        config: TrainingConfig,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.model, self.method, self.training, self.config = model, method, training, config
        self.on_progress = on_progress
        self.device = device_of(model)
        self.generator = torch.Generator().manual_seed(config.seed)
        decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        rest = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
        if not decayed and not rest:
            raise TrainingError("every parameter is frozen (requires_grad=False): nothing to train")
        self.optimizer = torch.optim.SGD(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
        )
        self.total_steps = config.epochs * math.ceil(len(training) / config.batch_size)
        self.step = 0
        self.started: float | None = None

    def epoch(self, epoch: int) -> float:
        """Train for one epoch and return its mean loss."""
        config, losses, seen = self.config, 0.0, 0
        clean = epoch <= config.clean_epochs
        attack = Attack(config.threat, config.steps, self.generator)
        self.model.train()
        for images, labels in self.training.batches(
            config.batch_size, seed=config.seed * 1000 + epoch, augment=config.augment
        ):
            self._schedule()
            self.started = self.started or time.perf_counter()
            if len(images) < 2:
                continue  # batch norm needs two
            images, labels = images.to(self.device), labels.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.amp):
                loss = (
                    nn.functional.cross_entropy(self.model(images), labels)
                    if clean
                    else self.method(self.model, images, labels, attack)
                )
            value = float(loss.detach())
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss is {value} in epoch {epoch}, after {self.step} steps; try a lower "
                    f"learning rate than {config.lr:g}"
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            losses, seen = losses + value * len(images), seen + len(images)
            self._tell(epoch, seen, losses / seen)
        return losses / max(seen, 1)

    def _schedule(self) -> None:
        """One cycle: a linear rise over the warm-up, then a cosine to zero."""
        done = self.step / max(self.total_steps, 1)
        self.step += 1
        warmup = self.config.warmup
        rising = (self.step / max(self.total_steps, 1)) / warmup if warmup > 0 else 1.0
        falling = 0.5 * (1 + math.cos(math.pi * max(0.0, done - warmup) / (1 - warmup)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * min(rising, 1.0) * falling

    def _tell(self, epoch: int, seen: int, loss: float) -> None:
        if self.on_progress is None:
            return
        total = len(self.training)
        elapsed = time.perf_counter() - (self.started or 0.0)
        done = (epoch - 1) * total + seen
        rate = done / max(elapsed, 1e-9)
        left = (self.config.epochs * total - done) / max(rate, 1e-9)
        self.on_progress(Progress(epoch, self.config.epochs, seen, total, loss, rate, left))


def _validate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: TrainingConfig,
    epoch: int,
    loss: float,
    start: float,
) -> EpochRecord:
    model.eval()
    clean = (predict(model, images) == labels).double().mean()
    robust = pgd_correct(
        model, images, labels, threat=config.threat, steps=VALIDATION_STEPS, seed=config.seed
    )
    return EpochRecord(
        epoch, loss, float(clean), float(robust.double().mean()), time.perf_counter() - start
    )
