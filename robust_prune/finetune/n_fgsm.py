"""Single-step adversarial training with strong noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.adversaries.projections import random_start, steepest
from robust_prune.finetune.attack import Attack
from robust_prune.modules import evaluating, requires_grad
from robust_prune.types import ThreatModel


def n_fgsm(model: nn.Module, images: Tensor, labels: Tensor, attack: Attack) -> Tensor:
    """Return the mean cross-entropy after noise of 2 * eps and one step of eps, not clipped.

    Source: de Jorge et al., "Make some noise: reliable and efficient single-step adversarial
    training", NeurIPS 2022, arXiv 2202.01181. As there, the sum is not projected to the ball;
    deviations: the attack sees eval mode, and for l2 the step has norm eps.
    """
    threat = attack.threat
    wide = (
        ThreatModel(threat.norm, min(2 * threat.eps, 0.999))
        if threat.norm == "linf"
        else (ThreatModel(threat.norm, 2 * threat.eps))
    )
    noisy = (images + random_start(images, wide, attack.generator)).requires_grad_(True)
    with evaluating(model), requires_grad(model, False):
        loss = F.cross_entropy(model(noisy), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, noisy)
    moved = noisy.detach() + threat.eps * steepest(gradient, threat)
    return F.cross_entropy(model(moved), labels)
