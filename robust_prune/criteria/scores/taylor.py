"""The change of the adversarial loss when a channel goes, to first order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_prune.adversaries import AdversarialSet, gradients_of
from robust_prune.criteria.scoring import sum_by_unit
from robust_prune.graph import Groups
from robust_prune.modules import evaluating, network_of, requires_grad
from robust_prune.registry import channel_score


@channel_score("taylor")
@torch.enable_grad()
def taylor(model: nn.Module, graph: Groups, adversarial: AdversarialSet) -> dict[str, Tensor]:
    """Return by group [units]: mean over batches of the squared first-order loss change.

    Removing a unit zeroes the columns that read it, which changes the loss by -sum(w * dL/dw)
    over those columns to first order; that is the derivative of a gate on the channel. The
    channels of an attention's queries have no such columns: their gate sits on the rows.
    Source: Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019,
    Eq. 8 with gates; ours: adversarial batches, and all readers of a group together.
    """
    tensors = dict(network_of(model).named_parameters())
    scores = {g.name: torch.zeros(g.units, dtype=torch.float64) for g in graph.groups}
    gates = {
        group.name: [
            *(slot for slot in graph.slots(group.name) if slot.role == "in"),
            *graph.gates(group.name),
        ]
        for group in graph.groups
    }
    names = list(dict.fromkeys(slot.tensor for group in gates.values() for slot in group))
    weights = [tensors[name] for name in names]
    with evaluating(model), requires_grad(model, False):
        for weight in weights:
            weight.requires_grad_(True)
        for images, labels in adversarial.batches():
            _, found = gradients_of(model, weights, images, labels, "mean")
            gradients = dict(zip(names, found, strict=True))
            share = len(images) / len(adversarial)
            for name, slots in gates.items():
                change = torch.zeros_like(scores[name])
                for slot in slots:
                    gradient = gradients[slot.tensor]
                    if gradient is not None:  # products one by one: all would be another model
                        product = tensors[slot.tensor].detach() * gradient
                        change += sum_by_unit(slot, product, len(change))
                scores[name] += share * change.square()
    return scores
