"""The geometry of a threat model: random starts, steepest steps and projections."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_prune.types import ThreatModel


def random_start(images: Tensor, threat: ThreatModel, generator: torch.Generator | None) -> Tensor:
    """Return a perturbation [N, C, H, W], uniform in the ball."""
    if threat.norm == "linf":
        noise = torch.rand(images.shape, generator=generator, dtype=images.dtype).to(images.device)
        return (2 * noise - 1) * threat.eps
    direction = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    radius = torch.rand(len(images), generator=generator, dtype=images.dtype)
    radius = radius ** (1 / images[0].numel())
    unit = direction / norms(direction)
    return (unit * radius.view(-1, 1, 1, 1) * threat.eps).to(images.device)


def steepest(gradient: Tensor, threat: ThreatModel) -> Tensor:
    """Return the direction [N, C, H, W] of steepest ascent with unit norm."""
    if threat.norm == "linf":
        return gradient.sign()
    return gradient / norms(gradient).clamp_min(1e-12)


def project(perturbation: Tensor, images: Tensor, threat: ThreatModel) -> Tensor:
    """Return the perturbation moved back into the ball and `images + perturbation` into [0, 1].

    For l2 the two projections are done one after the other, which stays inside both sets.
    """
    if threat.norm == "linf":
        perturbation = perturbation.clamp(-threat.eps, threat.eps)
    else:
        scale = (threat.eps / norms(perturbation).clamp_min(1e-12)).clamp_max(1.0)
        perturbation = perturbation * scale
    return (images + perturbation).clamp(0, 1) - images


def norms(perturbation: Tensor) -> Tensor:
    """Return the Euclidean norm per image, [N, 1, 1, 1]."""
    lengths: Tensor = torch.linalg.vector_norm(perturbation.flatten(1), dim=1)
    return lengths.view(-1, 1, 1, 1)
