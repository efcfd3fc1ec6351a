"""Projected gradient descent."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from robust_prune.adversaries.losses import Loss, cross_entropy
from robust_prune.adversaries.projections import project, random_start, steepest
from robust_prune.errors import AttackError
from robust_prune.modules import as_memory_allows, device_of, evaluating, requires_grad
from robust_prune.types import ThreatModel

T = TypeVar("T")


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float | None = None,
    start: bool | Tensor = True,
    generator: torch.Generator | None = None,
    loss: Loss | None = None,
) -> Tensor:
    """Move images uphill on the loss, staying within the threat model and in [0, 1].

    Args:
        model: gives logits [N, K]; its mode (train or eval) is the caller's business.
        images: [N, C, H, W] in [0, 1].
        labels: [N].
        threat: norm and eps.
        steps: gradient steps; 1 is the fast gradient sign method.
        step_size: length of a step in the threat's norm; default 2.5 * eps / steps, but at least
            eps / 4 as in the usual 2/255 for 8/255.
        start: begin at a random point of the ball, or at this one [N, C, H, W].
        generator: source of that point (CPU); torch's global generator if None.
        loss: logits [N, K] -> loss [N]; cross-entropy against `labels` if None.

    Returns:
        Images [N, C, H, W], detached. No gradient reaches the parameters.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR
    2018, arXiv 1706.06083. The last iterate is returned, as there.
    """
    step_size = step_size or max(2.5 * threat.eps / steps, threat.eps / 4)
    loss = loss or cross_entropy(labels)
    images = images.detach()
    delta = torch.zeros_like(images)
    if isinstance(start, Tensor):
        delta = project(start, images, threat)
    elif start:
        delta = project(random_start(images, threat, generator), images, threat)
    for _ in range(steps):
        delta.requires_grad_(True)
        with torch.enable_grad():
            total = loss(model(images + delta)).sum()
        gradient = gradient_of(total, delta)
        moved = delta.detach() + step_size * steepest(gradient, threat)
        delta = project(moved, images, threat)
    return (images + delta).clamp(0, 1).detach()


def survivors(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    start: Tensor,
    judge: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """Return [N] booleans: right on the clean image and on every iterate of PGD; and of these,
    attacked without ever having a gradient.

    The worst case over iterates, as AutoAttack counts. Images drop out when they are fooled, which
    costs a third of attacking all of them to the end.

    Args:
        model: gives logits [N, K]; its mode is the caller's business.
        images: [N, C, H, W] in [0, 1].
        labels: [N].
        threat: norm and eps.
        steps: gradient steps after the start.
        step_size: length of a step in the threat's norm.
        start: `random_start` of the images.
        judge: whose verdicts count, where that is another model than the one that gives gradients.
    """
    verdicts = judge or model
    right: Tensor = verdicts(images).argmax(1) == labels
    left = right.nonzero().squeeze(1)
    delta, blind = project(start, images, threat)[left], right.clone()
    for _ in range(steps):
        if len(left) == 0:
            return right, blind
        delta.requires_grad_(True)
        with torch.enable_grad():
            logits = model(images[left] + delta)
            loss = cross_entropy(labels[left])(logits).sum()
        gradient = gradient_of(loss, delta)
        blind[left] &= ~(gradient.flatten(1).abs().amax(1) > 0)  # NaN is no gradient either
        moved = delta.detach() + step_size * steepest(gradient, threat)
        with torch.no_grad():
            told = logits if judge is None else judge(images[left] + delta)
        holds = told.detach().argmax(1) == labels[left]
        right[left[~holds]] = False
        delta, left = project(moved, images[left], threat)[holds], left[holds]
    if len(left):
        right[left] = verdicts(images[left] + delta).argmax(1) == labels[left]
    return right, blind & right


def gradient_of(loss: Tensor, delta: Tensor) -> Tensor:
    """Return the gradient of a loss by the images' disturbance.

    Raises:
        AttackError: the loss does not depend on it.
    """
    found = torch.autograd.grad(loss, delta, allow_unused=True) if loss.requires_grad else (None,)
    if found[0] is None:
        raise AttackError(
            "no gradient reaches the images: is there a torch.no_grad, a detach or an argmax in "
            "the model's forward? Attacks by gradients can't judge such a model"
        )
    return found[0]


def pgd_correct(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    seed: int,
    step_size: float | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Return [N] booleans: right on the clean image and on every iterate of PGD.

    `step_size` is eps / 4 if None.
    """
    return pgd_verdicts(
        model,
        images,
        labels,
        threat=threat,
        steps=steps,
        seed=seed,
        step_size=step_size,
        batch_size=batch_size,
    )[0]


def pgd_verdicts(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    seed: int,
    step_size: float | None = None,
    batch_size: int = 256,
    judge: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """Return [N] booleans twice: right to the end of PGD, and of these, without any gradient.

    `judge` as `survivors` has it.
    """

    def attack(clean: Tensor, target: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        return survivors(
            model,
            clean,
            target,
            threat=threat,
            steps=steps,
            step_size=step_size or threat.eps / 4,
            start=start,
            judge=judge,
        )

    with evaluating(model), requires_grad(model, False), torch.no_grad():
        parts = in_parts(attack, model, images, labels, threat, seed, batch_size)
    right, blind = (torch.cat(verdicts).cpu() for verdicts in zip(*parts, strict=True))
    return right, blind


def in_parts(
    attack: Callable[[Tensor, Tensor, Tensor], T],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    seed: int,
    batch_size: int,
) -> list[T]:
    """Return what an attack gives for each part of the images, in order.

    Random starts are drawn by batch, so that they are the same where memory halves the parts.

    Args:
        attack: called with images, labels and random starts, on the model's device.
        model: the one that is attacked.
        images: [N, C, H, W] in [0, 1].
        labels: [N].
        threat: norm and eps.
        seed: of the random starts.
        batch_size: images at a time, at most.
    """
    generator = torch.Generator().manual_seed(seed)
    device = device_of(model)

    def run(batch: tuple[Tensor, ...], size: int) -> list[T]:
        return [attack(*part) for part in zip(*(torch.split(t, size) for t in batch), strict=True)]

    parts: list[T] = []
    for clean, target in zip(
        torch.split(images, batch_size), torch.split(labels, batch_size), strict=True
    ):
        clean = clean.to(device)
        batch = clean, target.to(device), random_start(clean, threat, generator)
        parts += as_memory_allows(functools.partial(run, batch), len(clean), "attacks")
    return parts
