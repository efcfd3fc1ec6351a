"""What a compression is asked to do, what it gives back, and what can be listened to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from robust_prune import evaluation
from robust_prune.allocation import ALLOCATIONS, MAX_PRUNE_RATIO
from robust_prune.criteria import ESTIMATORS, SCORES, Estimator, Score
from robust_prune.errors import UsageError
from robust_prune.evaluation import Attack
from robust_prune.finetune import (
    EpochRecord,
    History,
    Method,
    Progress,
    TrainingConfig,
    resolve_method,
)
from robust_prune.types import Budget, Evaluation, PruningPlan, Sensitivity, ThreatModel

CALIBRATION_IMAGES = 512
# of fine-tuning alone, where `training_options` do not say otherwise
FINE_TUNING: Mapping[str, Any] = {"schedule": "constant", "ema": 0.999}
LINF_8 = ThreatModel.linf("8/255")


@dataclass(frozen=True)
class Settings:
    """What `compress` is asked to do.

    `steps` prunes and fine-tunes so often, with sensitivity measured anew each time; `epochs` are
    those of all steps together. `training_options` are further fields of `TrainingConfig`.

    Fine-tuning goes at a high, constant rate and keeps the running average of the weights. Pruned
    models need high rates to learn what they lost (Le and Hua, "Network pruning that matters", ICLR
    2021, arXiv 2105.03193); robust overfitting sets in where rates fall (Rice et al., "Overfitting
    in adversarially robust deep learning", ICML 2020, arXiv 2002.11569); the average does what a
    falling rate is for (averages in adversarial training: Gowal et al., arXiv 2010.03593). That
    they belong together after pruning is ours (`python -m benchmarks.finetuning`).
    """

    budget: Budget = field(default_factory=lambda: Budget("macs", 0.5))
    threat: ThreatModel = LINF_8
    allocation: str = "curve"
    score: Score = "l2"
    method: Estimator = "first-order"
    finetune: str | Method | None = None
    epochs: int = 0
    lr: float = 0.1
    attack_steps: int = 7
    training_options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1
    batch_size: int = 128
    protect: tuple[str, ...] = ()
    min_width: int = 2
    max_prune_ratio: float = MAX_PRUNE_RATIO
    round_to: int = 1
    whole_heads: bool = False
    reconstruct: bool = True
    verify: bool = True
    calibration_images: int | None = None
    evaluation: Attack = "none"
    n_eval: int = 200
    plan: PruningPlan | None = None
    notes: tuple[str, ...] = ()
    input_size: tuple[int, int, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.finetune is None) != (self.epochs == 0):
            raise UsageError(
                f"fine-tuning needs a method and epochs: got {self.finetune!r} for {self.epochs}"
            )
        few = self.calibration_images is not None and self.calibration_images < 1
        if few or self.batch_size < 2:
            raise UsageError("calibration needs at least 1 image, and batches at least 2")
        known = (
            ("allocation", self.allocation, ALLOCATIONS),
            ("score", self.score, SCORES),
            ("MRS method", self.method, ESTIMATORS),
            ("attack", self.evaluation, evaluation.ATTACKS),
        )
        for what, value, values in known:
            if self.plan is None and value not in values:
                raise UsageError(f"{what} {value!r} is not known; use one of {', '.join(values)}")
        if self.steps < 1 or (self.steps > 1 and self.plan is not None):
            raise UsageError(
                f"pruning in {self.steps} steps: there must be 1 or more, and a plan is replayed "
                "in one"
            )
        if self.finetune is not None:
            resolve_method(self.finetune)
            if self.epochs < self.steps:
                raise UsageError(
                    f"{self.epochs} epochs are too few for {self.steps} steps; each needs one"
                )
            self.training(self.steps)
        if self.round_to < 1 or self.min_width < 1:
            raise UsageError(
                f"widths are rounded to multiples of 1 or more and keep 1 channel or more, not "
                f"{self.round_to} and {self.min_width}"
            )
        if not 0 < self.max_prune_ratio < 1:
            raise UsageError(f"max prune ratio {self.max_prune_ratio:g} must be between 0 and 1")

    def epochs_of(self, step: int) -> int:
        """Return the epochs of a pruning step: half of all before the last, shared out equally."""
        between = max(1, self.epochs // (2 * self.steps)) if self.steps > 1 else 0
        return between if step < self.steps else self.epochs - between * (self.steps - 1)

    def training(self, step: int = 1) -> TrainingConfig:
        """Return the settings of the fine-tuning run after a pruning step, counted from 1."""
        assert self.finetune is not None
        fields = {f.name for f in dataclasses.fields(TrainingConfig)}
        given: dict[str, Any] = {
            "method": self.finetune,
            "epochs": self.epochs_of(step),
            "threat": self.threat,
            "attack_steps": self.attack_steps,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "seed": self.seed,
        }
        if unknown := sorted(set(self.training_options) - (fields - set(given))):
            raise UsageError(
                f"training option {unknown[0]!r} is not known or set elsewhere; there are "
                f"{', '.join(sorted(fields - set(given)))}"
            )
        return TrainingConfig(**given, **{**FINE_TUNING, **self.training_options})


@dataclass(frozen=True)
class CompressResult:
    """The pruned model, the plan that made it, and the record of the run as plain data."""

    model: nn.Module
    plan: PruningPlan
    report: dict[str, Any]
    sensitivity: Sensitivity | None = None
    history: History | None = None
    dense: Evaluation | None = None
    pruned: Evaluation | None = None


@dataclass(frozen=True)
class Events:
    """What a caller can listen to; every listener may be left out."""

    stage: Callable[[str], None] = lambda line: None
    note: Callable[[str], None] = lambda line: None
    training: Callable[[Progress], None] | None = None
    epoch: Callable[[EpochRecord], None] | None = None
    evaluating: Callable[[str], None] | None = None
    saveable: Callable[[CompressResult], None] = lambda result: None
