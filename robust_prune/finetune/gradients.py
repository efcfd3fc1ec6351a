"""The gradients of one training step, of as many images at a time as memory takes."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from robust_prune.errors import TrainingError
from robust_prune.finetune.attack import Attack, Method
from robust_prune.modules import as_memory_allows, float32_logits


def gradients_(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    method: Method | None,
    *,
    seed: int,
    share: float = 1.0,
    amp: bool = False,
) -> float:
    """Give a model's parameters the gradients of a batch's mean loss, and return the loss.

    Where memory does not suffice the batch is taken in parts, and their gradients add up to that
    of its mean. Batch norms in training then use the statistics of parts, and so may the method.

    Args:
        model: in the mode to train in.
        images: [N, C, H, W] in [0, 1], on the model's device.
        labels: [N].
        attack: its generator is seeded.
        method: gives the loss; None learns from the images as they are.
        seed: of the attack and of whatever is drawn beside it (dropout).
        share: factor of the gradients.
        amp: compute in bfloat16.
    """

    def run(size: int) -> float:
        attack.generator.manual_seed(seed)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = None
        mean = 0.0
        n = len(images) // size  # parts of two at least, as batch norms need them
        for part, target in zip(images.tensor_split(n), labels.tensor_split(n), strict=True):
            logits = float32_logits(model) if amp else contextlib.nullcontext()
            with logits, torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
                loss = (
                    attack.cross_entropy(model(part), target)
                    if method is None
                    else method(model, part, target, attack)
                )
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                what = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise TrainingError(
                    "a training method must give the mean loss, a tensor of one number with a "
                    f"gradient, not {what}"
                )
            weight = len(part) / len(images)
            torch.autograd.backward(loss * (share * weight))
            mean += float(loss.detach()) * weight
        return mean

    effect = "batch norms see these parts"
    return as_memory_allows(run, len(images), "training", effect, fewest=min(2, len(images)))
