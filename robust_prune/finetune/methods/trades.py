"""TRADES: clean accuracy against smoothness."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.adversaries import kl_from
from robust_prune.finetune.attack import Attack
from robust_prune.registry import training_method

BETA = 6.0


@training_method("trades")
def trades(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, *, beta: float = BETA
) -> Tensor:
    """Return cross-entropy on clean images + beta * KL(clean || adversarial), both means.

    The attack maximises the same KL divergence.
    Source: Zhang et al., ICML 2019, arXiv 1901.08573, Eq. 5; beta 6 as in their CIFAR-10 runs.
    """
    with attack.seen_by(model) as seen, torch.no_grad():
        clean = F.softmax(seen(images), dim=1)
    adversarial = attack(model, images, labels, kl_from(clean))
    logits = model(images)
    log_adversarial = F.log_softmax(model(adversarial), dim=1)
    smoothness = F.kl_div(log_adversarial, F.softmax(logits, dim=1), reduction="batchmean")
    return attack.cross_entropy(logits, labels) + beta * smoothness
