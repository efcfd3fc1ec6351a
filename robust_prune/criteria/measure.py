"""MRS by any of its estimators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from robust_prune.adversaries import AdversarialSet
from robust_prune.data import DataSplits
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


def calibration_images(
    model: nn.Module, splits: DataSplits, n: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return images and labels to measure sensitivity on: held out of training, never of test.

    Where few are held out they are training images.
    """
    held_out = splits.validation
    source = splits.train if held_out is None or len(held_out) < ENOUGH_HELD_OUT else held_out
    images, labels = source.take(min(n, len(source)), seed)
    check_outputs(model, images, labels, splits.classes or None)
    return images, labels
