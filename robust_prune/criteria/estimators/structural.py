"""MRS as pruning finds it: the rise when half of a group is masked, by group alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from robust_prune.adversaries import AdversarialSet, adversarial_loss
from robust_prune.criteria.curves import structural_curves
from robust_prune.criteria.scoring import channel_scores
from robust_prune.graph import ModelGraph
from robust_prune.modules import evaluating
from robust_prune.registry import mrs_estimator
from robust_prune.types import Curve, GroupSensitivity, Sensitivity


@mrs_estimator("structural")
def structural_mrs(
    graph: ModelGraph,
    adversarial: AdversarialSet,
    *,
    scores: Mapping[str, Tensor] | None = None,
    **unused: Any,
) -> Sensitivity:
    """Measure MRS of every group; it takes l2 scores where none are given."""
    start = time.perf_counter()
    scores = scores or channel_scores(graph.model, graph, score="l2")
    curves = structural_curves(graph.model, graph, scores, adversarial, shares=(0.5,))
    return structural(graph, curves, adversarial, time.perf_counter() - start)


def structural(
    graph: ModelGraph,
    curves: Mapping[str, Curve],
    adversarial: AdversarialSet,
    seconds: float = 0.0,
) -> Sensitivity:
    """Return structural MRS: the rise of the adversarial loss when half of a group goes.

    It belongs to groups; `modules` stays empty.
    """
    used = adversarial.first(
        min((c.images for c in curves.values()), default=0) or len(adversarial)
    )
    with evaluating(graph.model):
        loss = adversarial_loss(graph.model, used)
    return Sensitivity(
        method="structural",
        rho=0.5,
        threat=adversarial.threat,
        attack=adversarial.attack,
        n=len(used),
        seed=adversarial.seed,
        adversarial_loss=loss,
        seconds=seconds,
        modules=(),
        groups=tuple(
            GroupSensitivity(g.name, g.width, max(curves[g.name].at(0.5), 0.0), g.name)
            for g in graph.groups
        ),
    )
