"""MRS of the linearised loss, in closed form: one pass for all layers."""

from __future__ import annotations

from typing import Any

from robust_prune.adversaries import AdversarialSet
from robust_prune.criteria.mrs import sensitivities
from robust_prune.graph import ModelGraph
from robust_prune.registry import mrs_estimator
from robust_prune.types import Sensitivity


@mrs_estimator("first-order")
def first_order_mrs(
    graph: ModelGraph, adversarial: AdversarialSet, *, scores: Any = None, **more: Any
) -> Sensitivity:
    """Measure MRS of every layer; a group takes the largest of its members."""
    return sensitivities(
        graph.model, adversarial, method="first-order", groups=graph.groups, **more
    )
