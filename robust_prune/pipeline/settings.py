"""What a compression is asked to do, what it gives back, and what can be listened to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from robust_prune.errors import UsageError
from robust_prune.finetune import (
    EpochRecord,
    History,
    Progress,
    TrainingConfig,
    check_optimizer,
    resolve_method,
)
from robust_prune.options import (
    FINE_TUNING_RATE,
    RATE_WITHOUT_BATCHNORM,
    BudgetOptions,
    DropOf,
    EvaluationOptions,
    FineTuningOptions,
    Judge,
    LatencyOptions,
    PlanningOptions,
    RunOptions,
    chosen,
    other_default,
    shares,
)
from robust_prune.registry import ALLOCATIONS, ESTIMATORS, SCORES
from robust_prune.types import Budget, Evaluation, PruningPlan, Sensitivity, Target, ThreatModel

CALIBRATION_IMAGES = 512
EVAL_IMAGES = {"cpu": 200, "cuda": 1000}
LEAST_RATIO = 0.01  # that a search over ratios begins at
PARTS = ("ratio_of", "also", "measured", "blocks")  # options of plans that are made in one step
LINF_8 = ThreatModel.linf("8/255")


@dataclass(frozen=True, kw_only=True)
class Settings(PlanningOptions, LatencyOptions, FineTuningOptions, EvaluationOptions):
    """What `compress` is asked to do: the options, and what they are about.

    `prune_steps` prunes and fine-tunes so often, with sensitivity measured anew each time; `epochs`
    are those of all steps together. No method means no fine-tuning, no evaluation means none. With
    `latency` the budget's ratio is of milliseconds, not of its target. With `max_drop` it is what
    a search over ratios begins at, and the plan says which was found.
    """

    budget: Budget = field(default_factory=lambda: Budget("macs", 0.5))
    latency: bool = False
    max_drop: float | None = other_default(BudgetOptions, "max_drop", None)
    max_drop_of: DropOf = other_default(BudgetOptions, "max_drop_of", BudgetOptions.max_drop_of)
    threat: ThreatModel = LINF_8
    epochs: int = other_default(FineTuningOptions, "epochs", 0)
    lr: float = other_default(FineTuningOptions, "lr", FINE_TUNING_RATE)
    evaluation: Judge = other_default(EvaluationOptions, "evaluation", "none")
    n_eval: int = other_default(EvaluationOptions, "n_eval", EVAL_IMAGES["cpu"])
    plan: PruningPlan | None = None
    notes: tuple[str, ...] = ()
    input_size: tuple[int, int, int] | None = None
    seed: int = RunOptions.seed

    def __post_init__(self) -> None:
        super().__post_init__()
        RunOptions(seed=self.seed)
        ThreatModel.checked(self.threat)
        check_optimizer(self.optimizer)  # also where nothing is fine-tuned
        if (self.finetune is None) != (self.epochs == 0):
            raise UsageError(
                f"fine-tuning needs a method and epochs: got {self.finetune!r} for {self.epochs}"
            )
        self._check_parts()
        if self.plan is None:
            ALLOCATIONS.find(self.allocation)
            SCORES.find(self.score)
            ESTIMATORS.find(self.estimator)
        elif self.prune_steps > 1:
            raise UsageError(f"pruning in {self.prune_steps} steps: a plan is replayed in one")
        if self.finetune is not None:
            resolve_method(self.finetune)
            if self.epochs < self.prune_steps:
                raise UsageError(
                    f"{self.epochs} epochs are too few for {self.prune_steps} steps; each needs one"
                )

    def _check_parts(self) -> None:
        """Raise where what is asked of single layers, or of several targets, can't be done."""
        given = [f"--{n.replace('_', '-')}" for n in PARTS if getattr(self, n)]
        if given and self.plan is not None:
            raise UsageError(f"{given[0]}: a plan that is replayed decides that; leave out one")
        if given and self.prune_steps > 1:
            raise UsageError(f"{given[0]}: not with {self.prune_steps} pruning steps")
        if self.blocks and not ALLOCATIONS.fact(self.allocation, "curves"):
            raise UsageError(
                f"--blocks: not with --allocation {self.allocation}, which has no curves"
            )
        if self.latency and (self.prune_steps > 1 or self.plan is not None):
            raise UsageError("--target latency: not with --steps or --plan")
        if self.max_drop is not None and (self.also or self.prune_steps > 1 or self.plan):
            raise UsageError("--max-drop: not with --also, --steps or --plan")
        if self.max_drop_of == "tuned" and (self.max_drop is None or self.finetune is None):
            raise UsageError("--max-drop-of tuned: needs --max-drop, and fine-tuning")
        if not self.latency and any(b.target == self.budget.target for b in self.also_budgets):
            raise UsageError(f"--also {self.budget.target}: that is what --ratio is about")

    @property
    def whole_blocks(self) -> bool:
        """Whether residual blocks may go whole."""
        if self.blocks is None:
            return self.latency and bool(ALLOCATIONS.fact(self.allocation, "curves"))
        return self.blocks

    @property
    def also_budgets(self) -> tuple[Budget, ...]:
        """What `also` asks for."""
        return tuple(
            Budget(target, ratio)  # type: ignore[arg-type]
            for target, ratio in shares(self.also, "--also").items()
        )

    def epochs_of(self, step: int) -> int:
        """Return the epochs of a pruning step: half of all before the last, shared out equally."""
        steps = self.prune_steps
        between = max(1, self.epochs // (2 * steps)) if steps > 1 else 0
        return between if step < steps else self.epochs - between * (steps - 1)

    def training(self, step: int = 1) -> TrainingConfig:
        """Return the settings of the fine-tuning run after a pruning step, counted from 1."""
        assert self.finetune is not None
        return TrainingConfig(
            **{
                **chosen(TrainingConfig, self),
                "method": self.finetune,
                "epochs": self.epochs_of(step),
            }
        )


def budget_of(options: BudgetOptions) -> dict[str, Any]:
    """Return what settings say of a budget that was asked for."""
    target: Target = "macs" if options.target == "latency" else options.target
    ratio = options.prune_ratio if options.max_drop is None else LEAST_RATIO
    return {
        "budget": Budget(target, ratio),
        "latency": options.target == "latency",
        "max_drop": options.max_drop,
        "max_drop_of": options.max_drop_of,
    }


def learning_rate(asked: float | None, model: nn.Module) -> float:
    """Return the peak rate of fine-tuning: what was asked, else one that the network stands.

    At 0.1 a robust residual network without batch norm loses what it knew: three quarters pruned,
    42.9 % PGD-20 after twelve epochs where 0.05 has 49.3 (benchmarks/records/2026-11-26_matrix).
    """
    if asked is not None:
        return asked
    steadied = any(isinstance(module, _BatchNorm) for module in model.modules())
    return FINE_TUNING_RATE if steadied else RATE_WITHOUT_BATCHNORM


def eval_images(asked: int | None, device: torch.device | str) -> int:
    """Return how many test images to measure on: what was asked, else what the device can do."""
    if asked is not None:
        return asked
    return EVAL_IMAGES["cuda" if str(device).startswith("cuda") else "cpu"]


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
