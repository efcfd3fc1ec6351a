"""Proof that a pruned model is what its plan says: the dense one with channels silenced."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_prune.errors import PlanError
from robust_prune.graph.applying import mask_
from robust_prune.graph.probing import RUN_ERRORS, TOLERANCES, is_large
from robust_prune.modules import copied, device_of, difference, evaluating, release_memory
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
    if is_large(dense):
        release_memory()
    images = images.to(device_of(dense), dtype)
    as_it_is = all(t.dtype == dtype for t in pruned.parameters())
    found = _outputs(pruned if as_it_is else copied(pruned).to(dtype), images)
    return difference(found, _outputs(mask_(copied(dense).to(dtype), plan), images))


def _outputs(model: nn.Module, images: Tensor) -> object:
    with evaluating(model):
        return model(images)


def check_pruned(
    dense: nn.Module, pruned: nn.Module, plan: PruningPlan, images: Tensor
) -> tuple[float, torch.dtype]:
    """Return the masking error and what it was computed in; PlanError if it is not rounding.

    Computed in float64, or in float32 for large models and those whose code insists on it.
    """
    dtype = torch.float32 if is_large(dense) else torch.float64
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
