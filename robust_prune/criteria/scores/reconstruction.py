"""What the readers' outputs lose when the other channels make up for one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_prune.adversaries import AdversarialSet
from robust_prune.criteria.scores.l2 import l2
from robust_prune.graph import ModelGraph
from robust_prune.modules import network_of
from robust_prune.registry import channel_score
from robust_prune.repair import dense_moments

DAMPING = 0.01  # of the mean squared input, for inverting second moments


@channel_score("reconstruction")
@torch.no_grad()
def reconstruction(
    model: nn.Module, graph: ModelGraph, adversarial: AdversarialSet
) -> dict[str, Tensor]:
    """Return by group [units]: the share of its readers' outputs lost for good when it goes.

    Removing the inputs b of a unit, while the weights of all others adapt by least squares, adds
    trace(W_b [(A^-1)_bb]^-1 W_b^T) to the squared error of a reader with inputs of second moment
    A; here relative to the energy of its outputs, summed over readers.
    Source: Hassibi and Stork, "Optimal brain surgeon", NeurIPS 1992, for blocks of inputs, with
    the layer's own least-squares Hessian; ours: adversarial images.
    """
    moments = dense_moments(model, adversarial.images, grams=True)
    tensors = {name: p.detach() for name, p in network_of(model).named_parameters()}
    plain = l2(model, graph)
    inverses: dict[str, Tensor] = {}
    scores = {}
    for group in graph.groups:
        total = torch.zeros(group.units, dtype=torch.float64)
        slots = [s for s in graph.slots(group.name) if s.role == "in" and s.layer in moments]
        for slot in slots:
            gram = moments[slot.layer].gram.double().cpu()
            weight = tensors[slot.tensor].flatten(1).double().cpu()
            if slot.layer not in inverses:
                damping = DAMPING * gram.diagonal().mean() + 1e-30
                inverses[slot.layer] = torch.linalg.inv(gram + damping * torch.eye(len(gram)))
            size = tensors[slot.tensor][0, 0].numel()
            blocks = slot.indices[:, None] * size + torch.arange(size)
            inverse = inverses[slot.layer][blocks[:, :, None], blocks[:, None, :]]
            own = weight[:, blocks].permute(1, 2, 0)  # [channels, kernel, out]
            lost = (own * torch.linalg.solve(inverse, own)).sum((1, 2))
            energy = ((weight @ gram) * weight).sum().clamp(min=1e-30)
            total.index_add_(0, slot.units, lost / energy)
        scores[group.name] = total if slots else plain[group.name]
    return scores
