"""Proof that a pruned model is what its plan says: the dense one with channels silenced."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from robust_prune.errors import PlanError
from robust_prune.graph import difference, mask_
from robust_prune.modules import device_of, evaluating
from robust_prune.types import PruningPlan

TOLERANCE = 1e-6


@torch.no_grad()
def masking_error(dense: nn.Module, pruned: nn.Module, plan: PruningPlan, images: Tensor) -> float:
    """Return how far the pruned model's logits are from the masked dense one's, in float64.

    Args:
        dense: the model before pruning; left as it was.
        pruned: the model after `prune_(model, plan)` and nothing else; left as it was.
        plan: what was pruned.
        images: [N, C, H, W] in [0, 1].

    Returns:
        The largest difference over the largest logit; some 1e-15 where pruning is right, infinite
        where either has no finite logits.
    """
    device = torch.device("cpu") if device_of(dense).type == "mps" else device_of(dense)
    masked = mask_(copy.deepcopy(dense).to(device).double(), plan)
    exact = copy.deepcopy(pruned).to(device).double()
    images = images.to(device).double()
    with evaluating(masked), evaluating(exact):
        return difference(exact(images), masked(images))


def check_pruned(dense: nn.Module, pruned: nn.Module, plan: PruningPlan, images: Tensor) -> float:
    """Return the masking error; raise PlanError where it is more than rounding."""
    error = masking_error(dense, pruned, plan, images)
    if not error <= TOLERANCE:
        raise PlanError(
            f"the pruned model is not the masked dense one: its logits differ by {error:.1e} of "
            f"the largest, the limit is {TOLERANCE:g}; nothing is written. Protect the layers that "
            "a custom module couples in its own way (--protect), register an adapter for it, or "
            "skip the check with --no-verify"
        )
    return error
