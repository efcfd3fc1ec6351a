"""MRS by any of its estimators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from robust_prune.adversaries import AdversarialSet
from robust_prune.data import DataSplits, Split
from robust_prune.graph import ModelGraph
from robust_prune.modules import check_outputs
from robust_prune.registry import ESTIMATORS
from robust_prune.types import Sensitivity

ENOUGH_HELD_OUT = 256


def measure_mrs(
    graph: ModelGraph,
    adversarial: AdversarialSet,
    estimator: str,
    scores: Mapping[str, Tensor] | None = None,
    **more: Any,
) -> Sensitivity:
    """Measure MRS by any of its estimators.

    Args:
        graph: of the model; left as it was.
        adversarial: the fixed set.
        estimator: `first-order`, `ascent`, `structural`, or `package.module:function`.
        scores: of channels, by group [units], for estimators that mask some.
        more: `rho`, `epochs` and `on_module` of `sensitivities`.
    """
    found: Sensitivity = ESTIMATORS.find(estimator)(graph, adversarial, scores=scores, **more)
    return found


def calibration_split(splits: DataSplits, n: int, spare: int = 0) -> Split:
    """Return what `n` calibration images are drawn from: the images held out of training.

    Training images where few are held out, or where fewer than `spare` of them would stay unseen.
    """
    held_out = splits.validation
    if held_out is None or len(held_out) < max(ENOUGH_HELD_OUT, n + spare if spare else 0):
        return splits.train
    return held_out


def calibration_images(
    model: nn.Module, splits: DataSplits, n: int, seed: int, spare: int = 0
) -> tuple[Tensor, Tensor]:
    """Return at most `n` images and labels to measure sensitivity on, never of the test split.

    They are the first of `calibration_split` in the order of this seed.
    """
    source = calibration_split(splits, n, spare)
    images, labels = source.take(min(n, len(source)), seed)
    check_outputs(model, images, labels, splits.classes or None)
    return images, labels
