"""Standard adversarial training."""

from __future__ import annotations

from torch import Tensor, nn

from robust_prune.finetune.attack import Attack
from robust_prune.registry import training_method


@training_method("pgd-at")
def pgd_at(model: nn.Module, images: Tensor, labels: Tensor, attack: Attack) -> Tensor:
    """Return the mean cross-entropy on PGD images.

    Source: Madry et al., ICLR 2018, arXiv 1706.06083, Eq. 2.1.
    """
    return attack.cross_entropy(model(attack(model, images, labels)), labels)
