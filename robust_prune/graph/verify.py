"""Proof that a pruned model is what its plan says: the dense one with channels silenced."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_prune.errors import PlanError
from robust_prune.graph.applying import mask_
from robust_prune.graph.probing import RUN_ERRORS, TOLERANCES
from robust_prune.modules import copied, device_of, difference, evaluating
from robust_prune.types import PruningPlan


@torch.no_grad()
def masking_error(
    dense: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    images: Tensor,
    dtype: torch.dtype = torch.float64,
) -> float:
    """Return how far the pruned model's logits are from the masked dense one's.

    Args:
        dense: the model before pruning; left as it was.
        pruned: the model after `prune_(model, plan)` and nothing else; left as it was.
        plan: what was pruned.
        images: [N, C, H, W] in [0, 1].
        dtype: what both compute in.

    Returns:
        The largest difference over the largest logit; some 1e-15 in float64 where pruning is
        right, infinite where the logits are not finite.
    """
    masked = mask_(copied(dense).to(dtype), plan)
    exact = copied(pruned).to(dtype)
    images = images.to(device_of(dense), dtype)
    with evaluating(masked), evaluating(exact):
        return difference(exact(images), masked(images))


def check_pruned(
    dense: nn.Module, pruned: nn.Module, plan: PruningPlan, images: Tensor
) -> tuple[float, torch.dtype]:
    """Return the masking error and what it was computed in; PlanError if it is not rounding.

    Computed in float64, or in float32 for models whose code insists on it.
    """
    dtype = torch.float64
    try:
        error = masking_error(dense, pruned, plan, images, dtype)
    except RUN_ERRORS:  # no float64 on this device or in this code
        dtype = torch.float32
        error = masking_error(dense, pruned, plan, images, dtype)
    if not error <= TOLERANCES[dtype]:
        raise PlanError(
            f"the pruned model is not the masked dense one: its logits differ by {error:.1e} of "
            f"the largest, the limit is {TOLERANCES[dtype]:g}; nothing is written. Protect the "
            "layers that a custom module couples in its own way (--protect), register an adapter "
            "for it, or skip the check with --no-verify"
        )
    return error, dtype
