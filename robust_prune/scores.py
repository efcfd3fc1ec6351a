"""Channel scores: which channels of a group go first."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.errors import UsageError
from robust_prune.graph import ModelGraph
from robust_prune.modules import evaluating, network_of, requires_grad
from robust_prune.mrs import AdversarialSet
from robust_prune.tracing.coupling import Slot

Score = Literal["taylor", "l2"]
SCORES: tuple[Score, ...] = ("taylor", "l2")


def channel_scores(
    model: nn.Module,
    graph: ModelGraph,
    *,
    score: Score = "taylor",
    adversarial: AdversarialSet | None = None,
) -> dict[str, Tensor]:
    """Score every unit of every group; the lowest go first.

    Args:
        model: left as it was.
        graph: its groups.
        score: `l2`, the group's weight norm; `taylor`, the first-order change of the adversarial
            loss when the unit goes, which needs `adversarial`.
        adversarial: images to take gradients on.

    Returns:
        By group, float64 scores [units] on the CPU, not comparable between groups for `l2`.
    """
    if score not in SCORES:
        raise UsageError(f"score {score!r} is not known; use one of {', '.join(SCORES)}")
    if score == "l2":
        return l2(model, graph)
    if adversarial is None:
        raise UsageError("score 'taylor' needs adversarial images; use 'l2' without data")
    return taylor(model, graph, adversarial)


def sum_by_unit(slot: Slot, values: Tensor, units: int) -> Tensor:
    """Sum a parameter-shaped tensor over everything but a slot's channels, by unit.

    Returns float64 [units] on the CPU: sums of rows on the output side, of columns on the input
    side.
    """
    sums = values.movedim(slot.dim, 0).reshape(values.shape[slot.dim], -1).sum(1).double().cpu()
    return torch.zeros(units, dtype=torch.float64).index_add_(0, slot.units, sums[slot.indices])


def l2(model: nn.Module, graph: ModelGraph) -> dict[str, Tensor]:
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


@torch.enable_grad()
def taylor(model: nn.Module, graph: ModelGraph, adversarial: AdversarialSet) -> dict[str, Tensor]:
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
            loss = F.cross_entropy(model(images), labels)
            gradients = dict(
                zip(names, torch.autograd.grad(loss, weights, allow_unused=True), strict=True)
            )
            products = {
                name: weight.detach() * gradient
                for name, weight in zip(names, weights, strict=True)
                if (gradient := gradients[name]) is not None
            }
            share = len(images) / len(adversarial)
            for name, slots in gates.items():
                change = torch.zeros_like(scores[name])
                for slot in slots:
                    if slot.tensor in products:
                        change += sum_by_unit(slot, products[slot.tensor], len(change))
                scores[name] += share * change.square()
    return scores
