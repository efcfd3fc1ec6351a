"""Single-step adversarial training with strong noise."""

from __future__ import annotations

from torch import Tensor, nn

from robust_prune.finetune.attack import Attack
from robust_prune.registry import training_method


@training_method("n-fgsm", single_step=True)
def n_fgsm(model: nn.Module, images: Tensor, labels: Tensor, attack: Attack) -> Tensor:
    """Return the mean cross-entropy on images of N-FGSM.

    Source: de Jorge et al., NeurIPS 2022, arXiv 2202.01181; see `Attack.single_step`. Deviation:
    the attack sees eval mode unless the run says otherwise.
    """
    return attack.cross_entropy(model(attack.single_step(model, images, labels)), labels)
