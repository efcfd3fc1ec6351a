"""A fixed set of adversarial images, made once at the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.adversaries.pgd import pgd
from robust_prune.modules import device_of, evaluating, requires_grad
from robust_prune.types import (
    ThreatModel,
)


@dataclass(frozen=True)
class AdversarialSet:
    """Adversarial images [N, C, H, W] made once at the trained weights, with labels [N]."""

    images: Tensor
    labels: Tensor
    threat: ThreatModel
    attack: str
    seed: int
    batch_size: int

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels, `batch_size` at a time."""
        yield from zip(
            torch.split(self.images, self.batch_size),
            torch.split(self.labels, self.batch_size),
            strict=True,
        )

    def __len__(self) -> int:
        return len(self.images)

    def first(self, n: int) -> AdversarialSet:
        """Return the first `n` of the images; they are in random order."""
        return replace(self, images=self.images[:n], labels=self.labels[:n])


def adversarial_set(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int = 10,
    step_size: float | None = None,
    seed: int = 0,
    batch_size: int = 128,
) -> AdversarialSet:
    """Attack images [N, C, H, W] in [0, 1] once by PGD, in eval mode, step eps / 4 by default.

    RiFT makes its set from test images; give training or held-out ones.
    """
    generator = torch.Generator().manual_seed(seed)
    device = device_of(model)
    parts = []
    with evaluating(model), requires_grad(model, False):
        for clean, target in zip(
            torch.split(images, batch_size), torch.split(labels, batch_size), strict=True
        ):
            parts.append(
                pgd(
                    model,
                    clean.to(device),
                    target.to(device),
                    threat=threat,
                    steps=steps,
                    step_size=step_size or threat.eps / 4,
                    generator=generator,
                )
            )
    return AdversarialSet(
        torch.cat(parts), labels.to(device), threat, f"PGD-{steps}", seed, batch_size
    )


@torch.no_grad()
def adversarial_loss(model: nn.Module, adversarial: AdversarialSet) -> float:
    """Return the mean cross-entropy, in nats, of the model in the mode it is in."""
    total = sum(
        float(F.cross_entropy(model(images), labels, reduction="sum"))
        for images, labels in adversarial.batches()
    )
    return total / len(adversarial)
