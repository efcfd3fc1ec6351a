"""ARD: on adversarial images the model answers as the dense one does on clean images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.finetune.attack import Attack
from robust_prune.finetune.methods.rslad import soft_labels
from robust_prune.registry import training_method

ALPHA = 1.0
TEMPERATURE = 30.0


@training_method("ard")
def ard(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    teacher: nn.Module,
    alpha: float = ALPHA,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Return alpha * t^2 * KL(T_t(x) || S_t(x')) + (1 - alpha) * cross-entropy on clean images.

    S_t is the model and T_t the teacher with logits divided by the temperature t. The attack
    maximises the cross-entropy. At alpha 1 the clean images do not go through the model.

    Args:
        model: gives logits [N, K].
        images: [N, C, H, W] in [0, 1].
        labels: [N].
        attack: the run's.
        teacher: gives logits [N, K]; seen in eval mode and without gradients.
        alpha: in [0, 1].
        temperature: positive.

    Source: Goldblum et al., "Adversarially robust distillation", AAAI 2020, arXiv 1905.09747;
    alpha 1 and temperature 30 are the defaults of their released code, and as there the
    cross-entropy is at temperature 1. Deviations: that code also divides the divergence by the
    number of classes, here it is the plain sum over them; it attacks in train mode, here the
    attack sees eval mode unless the run says otherwise.
    """
    targets = soft_labels(teacher, images, temperature)
    adversarial = attack(model, images, labels)
    log_adversarial = F.log_softmax(model(adversarial) / temperature, dim=1)
    divergence = F.kl_div(log_adversarial, targets, reduction="batchmean")
    loss = alpha * temperature**2 * divergence
    if alpha < 1:
        loss = loss + (1 - alpha) * attack.cross_entropy(model(images), labels)
    return loss
