"""The norm of all weights that go with a channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_prune.adversaries import AdversarialSet
from robust_prune.criteria.scoring import sum_by_unit
from robust_prune.graph import ModelGraph
from robust_prune.modules import network_of
from robust_prune.registry import channel_score


@channel_score("l2", data_free=True)
def l2(
    model: nn.Module, graph: ModelGraph, adversarial: AdversarialSet | None = None
) -> dict[str, Tensor]:
    """Return by group [units]: the norm of all weights that go with a unit, in and out.

    The group version of Li et al., "Pruning filters for efficient convnets", ICLR 2017.
    """
    tensors = dict(network_of(model).named_parameters())
    scores = {}
    for group in graph.groups:
        total = torch.zeros(group.units, dtype=torch.float64)
        for slot in graph.slots(group.name):
            if slot.role != "along":
                total += sum_by_unit(slot, tensors[slot.tensor].detach().square(), group.units)
        scores[group.name] = total.sqrt()
    return scores
