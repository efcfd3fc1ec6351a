"""MRS by any of its estimators."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from robust_prune.adversaries import AdversarialSet, adversarial_loss
from robust_prune.criteria.curves import structural_curves
from robust_prune.criteria.mrs import Estimator, sensitivities
from robust_prune.criteria.scores import channel_scores
from robust_prune.data import DataSplits, synthetic_images
from robust_prune.graph import ModelGraph
from robust_prune.modules import check_outputs, evaluating, predict
from robust_prune.types import Curve, GroupSensitivity, Sensitivity

ENOUGH_HELD_OUT = 256


def structural(
    graph: ModelGraph,
    curves: Mapping[str, Curve],
    adversarial: AdversarialSet,
    seconds: float = 0.0,
) -> Sensitivity:
    """Return structural MRS: the rise of the adversarial loss when half of a group goes.

    It belongs to groups; `modules` stays empty.
    """
    with evaluating(graph.model):
        loss = adversarial_loss(graph.model, adversarial)
    return Sensitivity(
        method="structural",
        rho=0.5,
        threat=adversarial.threat,
        attack=adversarial.attack,
        n=len(adversarial),
        seed=adversarial.seed,
        adversarial_loss=loss,
        seconds=seconds,
        modules=(),
        groups=tuple(
            GroupSensitivity(g.name, g.width, max(curves[g.name].at(0.5), 0.0), g.name)
            for g in graph.groups
        ),
    )


def measure_mrs(
    graph: ModelGraph,
    adversarial: AdversarialSet,
    method: Estimator,
    scores: Mapping[str, Tensor] | None = None,
    **more: Any,
) -> Sensitivity:
    """Measure MRS by any of its estimators; `structural` takes l2 scores where none are given."""
    model = graph.model
    if method != "structural":
        return sensitivities(model, adversarial, method=method, groups=graph.groups, **more)
    start = time.perf_counter()
    scores = scores or channel_scores(model, graph, score="l2")
    curves = structural_curves(model, graph, scores, adversarial, shares=(0.5,))
    return structural(graph, curves, adversarial, time.perf_counter() - start)


def calibration_images(
    model: nn.Module, splits: DataSplits | None, size: tuple[int, int, int], n: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return images and labels to measure sensitivity on: held out of training, never of test.

    Where few are held out they are training images. Without data the images are synthetic, and
    labelled by the model itself.
    """
    if splits is None:
        images = synthetic_images(n, size, seed)
        return images, predict(model, images, 64)
    held_out = splits.validation
    source = splits.train if held_out is None or len(held_out) < ENOUGH_HELD_OUT else held_out
    images, labels = source.take(min(n, len(source)), seed)
    check_outputs(model, images, labels, splits.classes or None)
    return images, labels
