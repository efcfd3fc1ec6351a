"""Other images in place of data, that were tried and did not win."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.data import DataSplits, from_iterable, stand_ins, synthetic_images
from robust_prune.modules import evaluating, outputs_of, predict, requires_grad

N = 512
Variant = Callable[[nn.Module, tuple[int, int, int], int], DataSplits]


def crops(model: nn.Module, size: tuple[int, int, int], seed: int) -> Tensor:
    """Return the product's stand-ins."""
    return stand_ins(model, size, N, seed).train.take(N, seed)[0]


def as_stand_ins(model: nn.Module, images: Tensor) -> DataSplits:
    """Label images by the model, and have them treated as stand-ins."""
    splits = from_iterable((images, predict(model, images, 64)), validation=False)
    return replace(splits, origin="stand-in photographs")


def noise(model: nn.Module, size: tuple[int, int, int], seed: int) -> DataSplits:
    """Smooth noise."""
    return as_stand_ins(model, synthetic_images(N, size, seed))


def own_statistics(model: nn.Module, size: tuple[int, int, int], seed: int) -> DataSplits:
    """Crops treated as data: batch-norm statistics are those of the crops."""
    images = crops(model, size, seed)
    return from_iterable((images, predict(model, images, 64)), validation=False)


def blended(model: nn.Module, size: tuple[int, int, int], seed: int) -> DataSplits:
    """Half of the crops blended with another one, at random shares."""
    images = crops(model, size, seed)
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(len(images), 1, 1, 1, generator=generator)
    share[::2] = 1.0
    others = images[torch.randperm(len(images), generator=generator)]
    return as_stand_ins(model, share * images + (1 - share) * others)


def stretched(model: nn.Module, size: tuple[int, int, int], seed: int) -> DataSplits:
    """Crops stretched to the whole of [0, 1]."""
    images = crops(model, size, seed)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return as_stand_ins(model, (images - low) / (high - low).clamp_min(1e-3))


def thresholded(model: nn.Module, size: tuple[int, int, int], seed: int) -> DataSplits:
    """Crops cut at their median into black and white, as strokes."""
    images = crops(model, size, seed)
    middle = images.flatten(1).median(1).values.view(-1, 1, 1, 1)
    return as_stand_ins(model, (images > middle).float())


def moved(model: nn.Module, size: tuple[int, int, int], seed: int, steps: int = 5) -> DataSplits:
    """Crops moved by a few gradient steps (length 1 in L2 at 3x32x32) towards balanced classes."""
    images = crops(model, size, seed)
    targets = torch.arange(len(images)) % outputs_of(model, images)
    length = (images[0].numel() / 3072) ** 0.5
    done = []
    with evaluating(model), requires_grad(model, False):
        for part, target in zip(torch.split(images, 64), torch.split(targets, 64), strict=True):
            for _ in range(steps):
                part.requires_grad_(True)
                loss = F.cross_entropy(model(part), target, reduction="sum")
                (slope,) = torch.autograd.grad(loss, part)
                norm = slope.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
                part = (part.detach() - length * slope / norm).clamp(0, 1)
            done.append(part.detach())
    return as_stand_ins(model, torch.cat(done))


VARIANTS: dict[str, Variant] = {
    "noise": noise,
    "own-statistics": own_statistics,
    "blended": blended,
    "stretched": stretched,
    "thresholded": thresholded,
    "moved": moved,
}
