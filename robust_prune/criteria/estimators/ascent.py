"""MRS by gradient ascent, layer by layer: the definition, and the slowest."""

from __future__ import annotations

from typing import Any

from robust_prune.adversaries import AdversarialSet
from robust_prune.criteria.mrs import sensitivities
from robust_prune.graph import ModelGraph
from robust_prune.registry import mrs_estimator
from robust_prune.types import Sensitivity


@mrs_estimator("ascent")
def ascent_mrs(
    graph: ModelGraph, adversarial: AdversarialSet, *, scores: Any = None, **more: Any
) -> Sensitivity:
    """Measure MRS of every layer; a group takes the largest of its members."""
    return sensitivities(graph.model, adversarial, method="ascent", groups=graph.groups, **more)
