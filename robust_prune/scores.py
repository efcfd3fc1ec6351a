"""Channel scores: which channels of a group go first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.costs import weight_of
from robust_prune.errors import UsageError
from robust_prune.graph import Member
from robust_prune.modules import evaluating, requires_grad
from robust_prune.mrs import AdversarialSet

Score = Literal["taylor", "l2"]
SCORES: tuple[Score, ...] = ("taylor", "l2")


def channel_scores(
    model: nn.Module,
    members: Mapping[str, Sequence[Member]],
    units: Mapping[str, int],
    *,
    score: Score = "taylor",
    adversarial: AdversarialSet | None = None,
) -> dict[str, Tensor]:
    """Score every unit of every group; the lowest go first.

    Args:
        model: left as it was.
        members: the layers of each group.
        units: how many units each group has.
        score: `l2`, the group's weight norm; `taylor`, the first-order change of the adversarial
            loss when the unit goes, which needs `adversarial`.
        adversarial: images to take gradients on.

    Returns:
        By group, float64 scores [units] on the CPU, not comparable between groups for `l2`.
    """
    if score not in SCORES:
        raise UsageError(f"score {score!r} is not known; use one of {', '.join(SCORES)}")
    if score == "l2":
        return {name: l2(members[name], units[name]) for name in members}
    if adversarial is None:
        raise UsageError("score 'taylor' needs adversarial images; use 'l2' without data")
    return taylor(model, members, units, adversarial)


def l2(members: Iterable[Member], units: int) -> Tensor:
    """Return [units]: the Euclidean norm of all weights that go with a unit, in and out.

    The group version of Li et al., "Pruning filters for efficient convnets", ICLR 2017.
    """
    total = torch.zeros(units, dtype=torch.float64)
    for member in members:
        if member.is_weighted:
            total += member.sum_by_unit(weight_of(member.module).detach().square(), units)
    return total.sqrt()


@torch.enable_grad()
def taylor(
    model: nn.Module,
    members: Mapping[str, Sequence[Member]],
    units: Mapping[str, int],
    adversarial: AdversarialSet,
) -> dict[str, Tensor]:
    """Return by group [units]: mean over batches of the squared first-order loss change.

    Removing a unit zeroes the columns that read it, which changes the loss by -sum(w * dL/dw)
    over those columns to first order; that is the derivative of a gate on the channel.
    Source: Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019,
    Eq. 8 with gates; ours: adversarial batches, and all readers of a group together.
    """
    scores = {name: torch.zeros(units[name], dtype=torch.float64) for name in members}
    readers = {
        name: [m for m in group if m.is_weighted and m.side == "in"]
        for name, group in members.items()
    }
    weights = list(dict.fromkeys(weight_of(m.module) for group in readers.values() for m in group))
    with evaluating(model), requires_grad(model, False):
        for weight in weights:
            weight.requires_grad_(True)
        for images, labels in adversarial.batches():
            loss = F.cross_entropy(model(images), labels)
            gradients = dict(
                zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True)
            )
            share = len(images) / len(adversarial)
            for name, group in readers.items():
                change = torch.zeros(units[name], dtype=torch.float64)
                for member in group:
                    weight = weight_of(member.module)
                    gradient = gradients[weight]
                    if gradient is not None:
                        change += member.sum_by_unit(weight.detach() * gradient, units[name])
                scores[name] += share * change.square()
    return scores
