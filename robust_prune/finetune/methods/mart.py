"""MART: misclassified images count more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.finetune.attack import Attack
from robust_prune.registry import training_method

WEIGHT = 5.0


@training_method("mart")
def mart(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, *, weight: float = WEIGHT
) -> Tensor:
    """Return boosted cross-entropy on PGD images + weight * a KL divergence that is the larger the
    less the clean image is recognised.

    With p of the clean and q of the PGD image, and y the label, it is the mean of
    `-log q_y - log(1 - max_{k != y} q_k) + weight * KL(p || q) * (1 - p_y)`. Gradients go through
    all of it, the last factor too. The attack maximises the cross-entropy.

    Source: Wang et al., "Improving adversarial robustness requires revisiting misclassified
    examples", ICLR 2020, the objective of MART; weight 5 is their lambda. Label smoothing is not
    applied: the boosted cross-entropy is not the one that it is defined for. Where released code
    adds small numbers inside logarithms, nothing is added here: log(1 - q_k) is taken as the log
    of the sum of all other q, and 1 - p_y by expm1, both from log-probabilities.
    """
    adversarial = attack(model, images, labels)
    log_clean = F.log_softmax(model(images), dim=1)
    log_adversarial = F.log_softmax(model(adversarial), dim=1)
    divergence = F.kl_div(log_adversarial, log_clean, reduction="none", log_target=True).sum(1)
    missed = -torch.expm1(_of(log_clean, labels))
    return (_boosted(log_adversarial, labels) + weight * divergence * missed).mean()


def _boosted(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return -log p_y - log(1 - max_{k != y} p_k), [N], of log-probabilities [N, K]."""
    chosen = F.one_hot(labels, log_probabilities.shape[1]).bool()
    rival = log_probabilities.masked_fill(chosen, -torch.inf).argmax(dim=1, keepdim=True)
    others = log_probabilities.scatter(1, rival, -torch.inf)
    return -_of(log_probabilities, labels) - others.logsumexp(dim=1)


def _of(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    return log_probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
