"""The ways of fine-tuning that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.finetune import Attack, TrainingConfig, rslad, soft_labels
from robust_prune.modules import evaluating
from robust_prune.options import Schedule
from robust_prune.types import ThreatModel

Method = str | Callable[..., Tensor]


@dataclass(frozen=True)
class Recipe:
    """One way of fine-tuning, on all training images.

    With `as_long_as`, the name of another recipe, `epochs` does not count: it is as many as take
    the seconds of our whole run with that one, planning included.
    """

    method: Method
    epochs: int = 5
    lr: float = 0.02
    ema: float = 0.0
    steps: int = 2
    schedule: Schedule = "one-cycle"
    amp: bool = True
    fold_batchnorm: bool = True
    as_long_as: str = ""

    def config(
        self, threat: ThreatModel, batch_size: int, epochs: int, seed: int
    ) -> TrainingConfig:
        """Return the training run."""
        return TrainingConfig(
            method=self.method,
            epochs=epochs,
            threat=threat,
            attack_steps=self.steps,
            lr=self.lr,
            ema=self.ema,
            schedule=self.schedule,
            amp=self.amp,
            fold_batchnorm=self.fold_batchnorm,
            batch_size=batch_size,
            seed=seed,
        )


def rslad_cross_entropy(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, *, teacher: nn.Module
) -> Tensor:
    """Return RSLAD's loss on images whose attack maximises the cross-entropy of the labels."""

    def by_labels(model: nn.Module, images: Tensor, _: Tensor, loss: object = None) -> Tensor:
        return attack(model, images, labels)

    loss: Tensor = rslad(model, images, labels, by_labels, teacher=teacher)
    return loss


def half_labels(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, *, teacher: nn.Module
) -> Tensor:
    """Return the mean of PGD-AT's loss and KL(T(x) || S(x')) on the same PGD images."""
    targets = soft_labels(teacher, images)
    logits = model(attack(model, images, labels))
    divergence = F.kl_div(F.log_softmax(logits, dim=1), targets, reduction="batchmean")
    return 0.5 * attack.cross_entropy(logits, labels) + 0.5 * divergence


def same_function(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, *, teacher: nn.Module
) -> Tensor:
    """Return KL(T(x') || S(x')): the model answers as the dense one does on the same PGD images."""
    adversarial = attack(model, images, labels)
    with evaluating(teacher):
        targets = soft_labels(teacher, adversarial)
    return F.kl_div(F.log_softmax(model(adversarial), dim=1), targets, reduction="batchmean")


BASELINE, TEXTBOOK = "pgd-at", "textbook"
AVERAGED = "pgd-at-averaged"  # what `compress` does by default
RECIPES = {
    BASELINE: Recipe("pgd-at"),
    "rslad": Recipe("rslad"),
    "trades": Recipe("trades"),
    "pgd-at-lr0.05": Recipe("pgd-at", lr=0.05),
    "rslad-lr0.05": Recipe("rslad", lr=0.05),
    "rslad+awp": Recipe("rslad+awp"),
    "pgd-at-ema": Recipe("pgd-at", ema=0.99),
    "rslad-ema": Recipe("rslad", ema=0.99),
    "mart": Recipe("mart"),
    "ard": Recipe("ard"),
    "pgd-at+awp": Recipe("pgd-at+awp"),
    "half-labels": Recipe(half_labels),
    "rslad-ce-attack": Recipe(rslad_cross_entropy),
    "same-function": Recipe(same_function),
    TEXTBOOK: Recipe("pgd-at", amp=False, fold_batchnorm=False, as_long_as=BASELINE),
    "pgd-at-lr0.1": Recipe("pgd-at", lr=0.1),
    AVERAGED: Recipe("pgd-at", lr=0.1, schedule="constant", ema=0.999),
    "textbook-lr0.1": Recipe(
        "pgd-at", lr=0.1, amp=False, fold_batchnorm=False, as_long_as=AVERAGED
    ),
}
