"""A fixed set of adversarial images, made once at the trained weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.adversaries.pgd import in_parts, pgd
from robust_prune.modules import as_memory_allows, device_of, evaluating, requires_grad
from robust_prune.types import ThreatModel


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

    def attack(clean: Tensor, target: Tensor, start: Tensor) -> Tensor:
        return pgd(
            model,
            clean,
            target,
            threat=threat,
            steps=steps,
            step_size=step_size or threat.eps / 4,
            start=start,
        )

    with evaluating(model), requires_grad(model, False):
        parts = in_parts(attack, model, images, labels, threat, seed, batch_size)
    return AdversarialSet(
        torch.cat(parts), labels.to(device_of(model)), threat, f"PGD-{steps}", seed, batch_size
    )


@torch.enable_grad()
def gradients_of(
    model: nn.Module,
    weights: Sequence[Tensor],
    images: Tensor,
    labels: Tensor,
    reduction: Literal["mean", "sum"],
    batch_size: int | None = None,
) -> tuple[float, Sequence[Tensor | None]]:
    """Return the cross-entropy of images and its gradient by each weight, None by those unused.

    Parts of the images are added up, where there are more than `batch_size` (default: all) or than
    memory takes; batch norms must be in eval mode, so that the sum is the same up to rounding. A
    weight's part is added while the backward pass goes on, so that there is one gradient of the
    model, not two.
    """

    def run(size: int) -> tuple[float, Sequence[Tensor | None]]:
        total, met = 0.0, set[Tensor]()
        sums = {weight: torch.zeros_like(weight) for weight in weights}  # before activations
        with _adding(sums, met):
            pairs = zip(torch.split(images, size), torch.split(labels, size), strict=True)
            for part, target in pairs:
                share = len(part) / len(images) if reduction == "mean" else 1.0
                loss = share * F.cross_entropy(model(part), target, reduction=reduction)
                torch.autograd.grad(loss, weights, allow_unused=True)
                total += float(loss.detach())
        return total, [sums[weight] if weight in met else None for weight in weights]

    return as_memory_allows(run, min(batch_size or len(images), len(images)), "gradients")


@contextlib.contextmanager
def _adding(sums: Mapping[Tensor, Tensor], met: set[Tensor]) -> Iterator[None]:
    """Add the gradient of each weight to its sum as soon as a backward pass has it.

    What the pass then returns takes no memory, and is zero.
    """

    def add(weight: Tensor, gradient: Tensor) -> Tensor:
        sums[weight].add_(gradient)
        met.add(weight)
        return gradient.new_zeros(()).expand_as(gradient)

    hooks = [
        w.register_hook(functools.partial(add, w))  # type: ignore[no-untyped-call]
        for w in sums
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def adversarial_loss(model: nn.Module, adversarial: AdversarialSet) -> float:
    """Return the mean cross-entropy, in nats, of the model in the mode it is in."""

    def loss(images: Tensor, labels: Tensor, size: int) -> float:
        return sum(
            float(F.cross_entropy(model(part), target, reduction="sum"))
            for part, target in zip(
                torch.split(images, size), torch.split(labels, size), strict=True
            )
        )

    total = sum(
        as_memory_allows(functools.partial(loss, images, labels), len(images), "losses")
        for images, labels in adversarial.batches()
    )
    return total / len(adversarial)
