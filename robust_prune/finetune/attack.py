"""The attack that a training method is handed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_prune.adversaries.losses import Loss
from robust_prune.adversaries.pgd import pgd
from robust_prune.modules import evaluating, requires_grad
from robust_prune.types import ThreatModel


@dataclass(frozen=True)
class Attack:
    """PGD with the settings of a training run.

    Attacks see the model in eval mode: with batch statistics in the attack, single-step training
    from scratch collapsed on narrow networks.
    """

    threat: ThreatModel
    steps: int
    generator: torch.Generator

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, loss: Loss | None = None
    ) -> Tensor:
        """Return adversarial images [N, C, H, W]; the model's mode is put back."""
        with evaluating(model), requires_grad(model, False):
            return pgd(
                model,
                images,
                labels,
                threat=self.threat,
                steps=self.steps,
                generator=self.generator,
                loss=loss,
            )
