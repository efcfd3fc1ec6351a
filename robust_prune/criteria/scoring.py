"""Channel scores: which channels of a group go first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_prune.adversaries import AdversarialSet
from robust_prune.errors import UsageError
from robust_prune.graph import ModelGraph, Slot
from robust_prune.registry import SCORES


def channel_scores(
    model: nn.Module,
    graph: ModelGraph,
    *,
    score: str = "taylor",
    adversarial: AdversarialSet | None = None,
) -> dict[str, Tensor]:
    """Score every unit of every group; the lowest go first.

    Args:
        model: left as it was.
        graph: its groups.
        score: `l2`, the group's weight norm; `taylor` and `fisher`, the change of the adversarial
            loss when the unit goes, to first and second order; `reconstruction`, what its readers'
            outputs lose when the others make up for it; or `package.module:function`, which gives
            such a mapping. All but `l2` need `adversarial`.
        adversarial: images to take gradients or activations on.

    Returns:
        By group, float64 scores [units] on the CPU; comparable between groups for `taylor` and
        `fisher` alone.
    """
    function = SCORES.find(score)
    if adversarial is None and not SCORES.fact(score, "data_free"):
        raise UsageError(f"score {score!r} needs adversarial images; use 'l2' without data")
    found: dict[str, Tensor] = function(model, graph, adversarial)
    for group in graph.groups:
        values = found.get(group.name)
        if values is None or values.shape != (group.units,) or not bool(values.isfinite().all()):
            raise UsageError(
                f"score {score!r} must give {group.units} finite numbers for group {group.name!r}"
            )
    return {group.name: found[group.name].detach().double().cpu() for group in graph.groups}


def sum_by_unit(slot: Slot, values: Tensor, units: int) -> Tensor:
    """Sum a parameter-shaped tensor over everything but a slot's channels, by unit.

    Returns float64 [units] on the CPU: sums of rows on the output side, of columns on the input
    side.
    """
    sums = values.movedim(slot.dim, 0).reshape(values.shape[slot.dim], -1).sum(1).double().cpu()
    return torch.zeros(units, dtype=torch.float64).index_add_(0, slot.units, sums[slot.indices])
