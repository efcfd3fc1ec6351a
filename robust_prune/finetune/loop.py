"""The training loop: from any batch to the end, and which epoch is kept."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robust_prune.data import Augmentation, Split, mixed
from robust_prune.distributed import ALONE, Processes
from robust_prune.errors import TrainingError, first_line
from robust_prune.finetune.attack import Attack
from robust_prune.finetune.averaging import WeightAverage
from robust_prune.finetune.choosing import Choice
from robust_prune.finetune.config import EpochRecord, History, Progress, TrainingConfig
from robust_prune.finetune.gradients import gradients_
from robust_prune.finetune.interruptions import interruptions
from robust_prune.finetune.preparing import Prepared, optimizer_of, prepare
from robust_prune.finetune.registry import resolve_method
from robust_prune.finetune.saved import STATE_ERRORS, Saved, check_state
from robust_prune.finetune.validation import VALIDATION_STEPS, validate
from robust_prune.modules import (
    images_in_free_memory,
    make_contiguous_,
    random_states,
    restore_random_states,
    running_statistics,
    seeded,
    telling_of_memory,
)


def train_(
    model: nn.Module,
    training: Split,
    validation: Split,
    config: TrainingConfig,
    *,
    teacher: nn.Module | None = None,
    processes: Processes = ALONE,
    saved: Saved | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> History:
    """Train in place; the model ends with the last epoch that is not less robust than one before.

    Validation images tell, and differences within their noise do not count (`no_less_robust`), but
    the model as it came is only left for one that is more robust than it. Ctrl-C ends the run
    between two batches with the best epoch so far, and `interrupted` says so; a second one ends it
    at once.

    Args:
        model: takes images in [0, 1]; ends in eval mode.
        training: images to learn from.
        validation: images to select by; never test images.
        config: the run.
        teacher: the dense model, for methods that distil; left as it was.
        processes: of the run; each takes its share of every batch.
        saved: keeps the state, and gives the one to go on from; the result is then bit for bit
            that of a run without a break, on a CPU with the same number of threads.
        on_progress: called after every batch.
        on_epoch: called after every epoch, 0 included.

    Raises:
        TrainingError: the loss is not finite; the model has its best weights so far.
        UsageError: a method that distils has no teacher, or the layout can't be used here.
    """
    make_contiguous_(model)
    ready = prepare(model, training, validation, config, teacher, processes)
    run = _Run(model, training, ready, processes, saved, on_progress, on_epoch)
    interrupted = False
    try:
        told = telling_of_memory(
            run.choice.notes.append, lambda: images_in_free_memory(model, ready.images[:1])
        )
        with seeded(config.seed), interruptions() as asked, told:
            run.start()
            while not run.finished:
                run.batches(asked)
                run.close_epoch()
            if processes.total(torch.tensor([float(asked())])).item() > 0:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        interrupted = True
    finally:
        run.leave()
    return History(
        method=ready.name,
        epochs=tuple(run.choice.records),
        best_epoch=run.choice.best_epoch,
        validation=f"PGD-{VALIDATION_STEPS} on {len(ready.labels)} validation images",
        interrupted=interrupted,
        notes=tuple(run.choice.notes),
        how=ready.how,
    )


class _Run:
    """A run between two batches: everything that a saved state holds."""

    def __init__(
        self,
        model: nn.Module,
        training: Split,
        ready: Prepared,
        processes: Processes,
        saved: Saved | None,
        on_progress: Callable[[Progress], None] | None,
        on_epoch: Callable[[EpochRecord], None] | None,
    ) -> None:
        self.model, self.training, self.ready, self.config = model, training, ready, ready.config
        self.processes, self.saved = processes, saved
        self.on_progress, self.on_epoch = on_progress, on_epoch
        self.method, self.single_step = ready.method, ready.single_step  # until it is switched
        self.optimizer = optimizer_of(model, self.config)
        self.average = WeightAverage(model, self.config.ema) if self.config.ema else None
        self.choice = Choice(self.config, len(ready.labels))
        self.epoch, self.batch, self.step = 1, 0, 0
        self.loss_sum, self.seen = 0.0, 0
        self._busy, self._trained = 0.0, 0  # seconds and images, for the rate
        self._since = time.perf_counter()

    def start(self) -> None:
        """Take up a saved state, or validate the model as it came."""
        mine = self.saved is not None and self.processes.first
        state = self.processes.from_first(self.saved.load() if mine and self.saved else None)
        if state is not None:
            try:
                self._take_up(state)
            except STATE_ERRORS as error:
                raise TrainingError(
                    f"the saved state does not fit this run ({first_line(error)}); delete it to "
                    "train anew"
                ) from None
        else:
            self.processes.share_(self.model)
            self._close(*self._validated(0, math.nan))

    @property
    def finished(self) -> bool:
        """Whether there is no epoch left."""
        return self.choice.stopped or self.epoch > self.config.epochs

    def batches(self, asked: Callable[[], bool]) -> None:
        """Train on what is left of the epoch; stop between two batches where asked to."""
        config, processes = self.config, self.processes
        self.model.train()
        source = self.training.batches(
            config.batch_size,
            seed=config.seed * 1000 + self.epoch,
            augment=Augmentation(config.augment, config.cutout, config.randaugment),
            start=self.batch,
            share=(processes.rank, processes.size),
        )
        attack = replace(self.ready.attack, threat=config.threat_at(self.epoch))
        while self.batch < self.ready.batches:
            begun, before = time.perf_counter(), self.seen
            images, labels = next(source)
            stop = self._learn(images, labels, attack, asked())
            self._busy += time.perf_counter() - begun
            self._trained += self.seen - before
            self._tell()
            if stop:
                self._save()
                raise KeyboardInterrupt
            if self.saved is not None and processes.first and self.saved.due():
                self._save()

    def _learn(self, images: Tensor, labels: Tensor, attack: Attack, asked: bool) -> bool:
        """Take one step; return whether any process was asked to stop."""
        config, processes = self.config, self.processes
        images = images.to(self.ready.device, memory_format=self.ready.layout)
        labels = labels.to(self.ready.device)
        n = len(images)
        clean = self.epoch <= config.clean_epochs
        whole, stop = processes.total(torch.tensor([n, asked], dtype=torch.float64)).tolist()
        loss = gradients_(
            self.model,
            images,
            labels,
            attack,
            None if clean else self.method,
            seed=mixed(config.seed, self.step * processes.size + processes.rank),
            share=n * processes.size / whole,  # processes average gradients: it counts by images
            amp=self.ready.amp,
        )
        total = processes.total(torch.tensor([loss * n], dtype=torch.float64)).item()
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss is {total / whole} in epoch {self.epoch}, after {self.step} steps; try "
                f"a lower learning rate than {config.lr:g}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step, config.epochs * self.ready.batches)
        if processes.size > 1:
            self._agree()
        if config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, self.step)
        self.loss_sum, self.seen = self.loss_sum + total, self.seen + int(whole)
        self.batch, self.step = self.batch + 1, self.step + 1
        return bool(stop > 0)

    def _agree(self) -> None:
        """Average gradients, and the running statistics of batch norms."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.processes.average_([*gradients, *running_statistics(self.model)])

    def close_epoch(self) -> None:
        """Validate, keep the best, and decide how the run goes on."""
        self._close(*self._validated(self.epoch, self.loss_sum / max(self.seen, 1)))

    def _validated(self, epoch: int, loss: float) -> tuple[EpochRecord, Tensor]:
        average = self.average.in_place_of(self.model) if self.average else contextlib.nullcontext()
        with average:
            record, verdicts = validate(
                self.model,
                self.ready.images,
                self.ready.labels,
                self.config,
                self.processes,
                single_step=self.single_step,
            )
        since, self._since = self._since, time.perf_counter()
        record = replace(
            record,
            epoch=epoch,
            loss=loss,
            lr=self.optimizer.param_groups[0]["lr"] if epoch else 0.0,
            seconds=self._since - since,
            images_per_second=self._rate,
        )
        return record, verdicts

    @property
    def _rate(self) -> float:
        """Images a second, validation not counted."""
        return self._trained / max(self._busy, 1e-9)

    def _close(self, record: EpochRecord, verdicts: Tensor) -> None:
        weights = self.average.state if self.average else self.model.state_dict()
        self.choice.take_in(record, verdicts, weights)
        if self.choice.collapsed(record, single_step=self.single_step):
            self._switch()
        self.choice.wait(record)
        if record.epoch:
            self.epoch, self.batch, self.loss_sum, self.seen = record.epoch + 1, 0, 0.0, 0
        if self.on_epoch is not None:
            self.on_epoch(record)  # before the state: what is told twice is replaced, not missed
        self._save()

    def _switch(self) -> None:
        """Go on with PGD training from the best epoch."""
        name = "pgd-at+awp" if self.ready.name.endswith("+awp") else "pgd-at"
        self.method, self.single_step = resolve_method(name)[1], False
        assert self.choice.best is not None
        self.model.load_state_dict(self.choice.best)
        if self.average is not None:
            self.average = WeightAverage(self.model, self.config.ema)
        self.optimizer = optimizer_of(self.model, self.config)

    _COUNTERS = ("epoch", "batch", "step", "loss_sum", "seen")

    def _save(self) -> None:
        if self.saved is None or not self.processes.first:
            return
        self.saved.save(
            {
                "model": self.model.state_dict(),
                "average": self.average.state if self.average else None,
                "optimizer": self.optimizer.state_dict(),
                "random": random_states(self.ready.device),
                **self.choice.state(),
                **{name: getattr(self, name) for name in self._COUNTERS},
            }
        )

    def _take_up(self, state: dict[str, Any]) -> None:
        check_state(state, self.model, self.optimizer, self.config, len(self.ready.labels))
        for name in self._COUNTERS:
            setattr(self, name, state[name])
        self.choice.take_up(state)
        if self.choice.switched:
            self._switch()
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.state = {k: v.to(self.ready.device) for k, v in state["average"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        if self.processes.first:
            restore_random_states(state["random"], self.ready.device)

    def leave(self) -> None:
        """Give the model its best weights, and no gradients."""
        if self.choice.best is not None:
            self.model.load_state_dict(self.choice.best)
        if self.config.channels_last:
            self.model.to(memory_format=torch.contiguous_format)  # as it came, for other devices
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.grad = None

    def _tell(self) -> None:
        if self.on_progress is None:
            return
        total = min(len(self.training), self.ready.batches * self.config.batch_size)
        left = (self.config.epochs - self.epoch + 1) * total - self.seen
        last = self.choice.records[-1]
        self.on_progress(
            Progress(
                epoch=self.epoch,
                epochs=self.config.epochs,
                images=self.seen,
                total=total,
                loss=self.loss_sum / max(self.seen, 1),
                images_per_second=self._rate,
                seconds_left=left / max(self._rate, 1e-9),
                clean=last.clean,
                robust=last.robust,
            )
        )
