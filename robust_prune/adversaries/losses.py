"""Losses that attacks maximise, one value per image."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor], Tensor]


def cross_entropy(labels: Tensor) -> Loss:
    """Return logits [N, K] -> cross-entropy [N] against `labels` [N]."""
    return lambda logits: F.cross_entropy(logits, labels, reduction="none")


def kl_from(probabilities: Tensor) -> Loss:
    """Return logits [N, K] -> KL(probabilities || softmax(logits)) [N], TRADES' inner loss."""
    return lambda logits: F.kl_div(
        F.log_softmax(logits, dim=1), probabilities, reduction="none"
    ).sum(1)
