"""Which epoch's weights stay, and whether a run goes on as it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from robust_prune.finetune.averaging import cloned
from robust_prune.finetune.config import EpochRecord, TrainingConfig
from robust_prune.finetune.validation import collapse, no_less_robust


class Choice:
    """The epochs so far, and what was decided after each.

    Attributes:
        records: one for each epoch, 0 included.
        notes: what the user should not miss.
        best: the weights that are kept, of `best_epoch`.
        peak_epoch: the most robust epoch.
        peak: its verdicts [N], on validation images.
        switched: the epoch after which training went on with PGD, 0 for none.
        stopped: whether training ends before its time.
    """

    _PLAIN = ("notes", "best_epoch", "peak_epoch", "peak", "switched", "stopped")

    def __init__(self, config: TrainingConfig, images: int) -> None:
        self.config = config
        self.records: list[EpochRecord] = []
        self.notes: list[str] = []
        self.best: dict[str, Tensor] | None = None
        self.best_epoch, self.peak_epoch = 0, 0
        self.peak = torch.zeros(images, dtype=torch.bool)
        self.switched, self.stopped = 0, False

    def take_in(self, record: EpochRecord, verdicts: Tensor, weights: dict[str, Tensor]) -> None:
        """Add an epoch, and keep a copy of its weights where it is no less robust than before."""
        better = not self.records or record.robust > self.records[self.peak_epoch].robust
        if better or (self.peak_epoch > 0 and no_less_robust(verdicts, self.peak)):
            self.best, self.best_epoch = cloned(weights), record.epoch
        if better:
            self.peak, self.peak_epoch = verdicts, record.epoch
        self.records.append(record)

    def collapsed(self, record: EpochRecord, *, single_step: bool) -> bool:
        """Tell catastrophic overfitting; return whether training must switch to PGD for it.

        Args:
            record: of the epoch that was just taken in.
            single_step: whether the method attacks with one step.
        """
        config = self.config
        told = collapse(self.records, config) if record.epoch and not self.switched else None
        if told is None:
            return False
        if not single_step or config.on_collapse == "continue" or record.epoch == config.epochs:
            self.notes.append(f"{told}; the best epoch before was kept, pgd-at and trades avoid it")
        elif config.on_collapse == "stop":
            self.stopped = True
            self.notes.append(f"{told}; training was stopped")
        else:
            self.switched = record.epoch
            self.notes.append(
                f"{told}; trained on with pgd-at ({config.attack_steps} steps) from epoch "
                f"{self.best_epoch}"
            )
        return self.switched > 0

    def wait(self, record: EpochRecord) -> None:
        """Stop where patience is out."""
        config = self.config
        full = config.clean_epochs + config.eps_warmup  # before, eps still rises
        waited = record.epoch - max(self.peak_epoch, full, self.switched)
        if config.patience is not None and waited >= config.patience and not self.stopped:
            self.stopped = True
            self.notes.append(
                f"stopped after epoch {record.epoch}: {waited} epochs without a more robust one"
            )

    def state(self) -> dict[str, Any]:
        """Return all of it as a saved state holds it."""
        return {
            "best": self.best,
            "records": [asdict(record) for record in self.records],
            **{name: getattr(self, name) for name in self._PLAIN},
        }

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        for name in self._PLAIN:
            setattr(self, name, state[name])
        self.records = [EpochRecord(**record) for record in state["records"]]
        self.best = state["best"]
