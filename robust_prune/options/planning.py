"""What is removed, and by which rules: options of the plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from robust_prune.errors import UsageError
from robust_prune.options.parsing import AUTO, number_or_auto, shares
from robust_prune.options.stating import Options, Range, option
from robust_prune.registry import ALLOCATIONS, ESTIMATORS, SCORES
from robust_prune.types import TARGETS

AskedTarget = Literal["macs", "params", "channels", "latency"]
DropOf = Literal["untuned", "tuned"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(Options):
    """How much is removed."""

    panel = "Pruning"

    prune_ratio: float = option(
        0.5,
        "Share of the target to remove, in (0, 1).",
        flag="--ratio",
        within=Range(0, 1, "low high", "0.5 removes half: between 0 and 1, both excluded"),
        required=True,
    )
    target: AskedTarget = option(
        "macs", "macs, params, channels, or latency: measured milliseconds on this device."
    )
    max_drop: float | None = option(
        None,
        "In place of a ratio: as much goes as costs at most so many percentage points of robust "
        "accuracy, measured on held-out training images.",
        within=Range(0, 100, "high", "in percentage points of robust accuracy"),
    )
    max_drop_of: DropOf = option(
        "untuned",
        "Which models --max-drop measures: untuned, or tuned, where every ratio that is tried is "
        "fine-tuned first.",
    )


@dataclass(frozen=True, kw_only=True)
class LatencyOptions(Options):
    """What milliseconds are measured with, for `--target latency` and `info --latency`."""

    panel = "Pruning"

    latency_batch: int = option(1, "Images at a time.", within=Range(low=1))
    latency_threads: int | None = option(
        None, "Threads of a CPU; default those that torch uses.", within=Range(low=1)
    )
    latency_precision: Precision = option("float32", "Number format.")


@dataclass(frozen=True, kw_only=True)
class PlanningOptions(Options):
    """By which rules the plan is made, and what is done to the weights that are left."""

    panel = "Pruning"

    allocation: str = option(
        "curve",
        "Rule that shares the budget out: curve (measured loss of each group), mrs (the paper's), "
        f"a control; one of {ALLOCATIONS}, or package.module:function.",
    )
    score: str = option("l2", f"Channel score: {SCORES}, or package.module:function.")
    estimator: str = option(
        "first-order",
        f"Estimator of MRS: {ESTIMATORS}, or package.module:function.",
        words="MRS estimator",
        flag="--mrs",
    )
    protect: tuple[str, ...] = option((), "Layer or pattern to leave whole; may be repeated.")
    only: tuple[str, ...] = option(
        (), "Layer or pattern that alone may lose channels; may be repeated."
    )
    ratio_of: tuple[str, ...] = option(
        (),
        "Share of their channels that layers lose, as 'layer3.*=0.7'; the others make up the rest "
        "of the budget. May be repeated.",
    )
    also: tuple[str, ...] = option(
        (),
        "Another target that must hold too, as params=0.6; may be repeated.",
    )
    measured: Path | None = option(
        None,
        "File that keeps what planning measures; where it is there, it is taken, for any ratio.",
    )
    calibration_images: int | None = option(
        None,
        "Training images to measure MRS on; default 512, fewer for large networks on a CPU.",
        within=Range(low=1),
    )
    round_to: int = option(
        1,
        "Make widths multiples of this, as hardware likes them (8, 16), or auto: what this device "
        "is measured to be fast at.",
        parse=number_or_auto("round to"),
        metavar="NUMBER",
        within=Range(low=AUTO),
    )
    min_width: int = option(2, "Least channels of a group.", within=Range(low=1), shown=False)
    max_prune_ratio: float = option(
        0.95,
        "Largest share of a group's channels that may go, to the nearest step of its widths.",
        within=Range(0, 1, "low high"),
        shown=False,
    )
    blocks: bool | None = option(
        None,
        "Residual blocks may go whole, where that costs less than channels do; by default with "
        "--target latency, where allocation is by curves.",
    )
    whole_heads: bool = option(
        False, "Attentions lose whole heads, not the same dims of every head."
    )
    reconstruct: bool = option(
        True,
        "Fit the weights that are left to the dense activations; --no-reconstruct leaves them.",
        flag="--no-reconstruct",
    )
    verify: bool = option(
        True,
        "Compare the pruned model with the masked dense one; --no-verify skips it.",
        flag="--no-verify",
    )
    prune_steps: int = option(
        1,
        "Prune and fine-tune so often, with sensitivity measured anew each time.",
        flag="--steps",
        within=Range(low=1),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        shares(self.ratio_of, "--ratio-of")
        for target, ratio in shares(self.also, "--also").items():
            if target not in TARGETS or ratio == 0:
                raise UsageError(
                    f"--also {target}={ratio:g}: give one of {', '.join(TARGETS)}, and a share "
                    "above 0"
                )
