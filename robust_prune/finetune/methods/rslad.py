"""RSLAD: the dense model's probabilities are the labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.adversaries import kl_from
from robust_prune.finetune.attack import Attack
from robust_prune.modules import evaluating
from robust_prune.registry import training_method

ADVERSARIAL_SHARE = 5 / 6


@training_method("rslad")
def rslad(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    teacher: nn.Module,
    adversarial_share: float = ADVERSARIAL_SHARE,
) -> Tensor:
    """Return share * KL(T(x) || S(x')) + (1 - share) * KL(T(x) || S(x)), both means over images.

    S is the model, T the teacher on clean images, at temperature 1. The attack maximises
    KL(T(x) || S(x')). The labels are not used.

    Args:
        model: gives logits [N, K].
        images: [N, C, H, W] in [0, 1].
        labels: [N].
        attack: the run's.
        teacher: gives logits [N, K]; seen in eval mode and without gradients.
        adversarial_share: in [0, 1].

    Source: Zi et al., "Revisiting adversarial robustness distillation: robust soft labels make
    student better", ICCV 2021, arXiv 2108.07969; 5/6 and 1/6 as in their released code. Deviation:
    that code also divides by the number of classes, here the divergence is the plain sum over them.
    """
    targets = soft_labels(teacher, images)
    adversarial = attack(model, images, labels, kl_from(targets))
    log_clean = F.log_softmax(model(images), dim=1)
    log_adversarial = F.log_softmax(model(adversarial), dim=1)
    clean_part = F.kl_div(log_clean, targets, reduction="batchmean")
    adversarial_part = F.kl_div(log_adversarial, targets, reduction="batchmean")
    return adversarial_share * adversarial_part + (1 - adversarial_share) * clean_part


def soft_labels(teacher: nn.Module, images: Tensor, temperature: float = 1.0) -> Tensor:
    """Return softmax(logits / temperature) [N, K] of the teacher in eval mode, without gradient."""
    with evaluating(teacher), torch.no_grad():
        return F.softmax(teacher(images) / temperature, dim=1)
