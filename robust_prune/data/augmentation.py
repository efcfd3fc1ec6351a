"""Augmentation of training images, drawn by seeds that do not depend on how a run is cut up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from robust_prune.modules import plain_layout, seeded


@dataclass(frozen=True)
class Augmentation:
    """What training images go through.

    Attributes:
        crop_and_flip: random crops, and flips where they keep the label.
        cutout: side in pixels of a square of zeros at a random place; 0 for none. Source: DeVries
            and Taylor, 2017, arXiv 1708.04552.
        randaugment: torchvision's RandAugment with its defaults. Source: Cubuk et al., 2020,
            arXiv 1909.13719.
    """

    crop_and_flip: bool = True
    cutout: int = 0
    randaugment: bool = False


def mixed(seed: int, index: int) -> int:
    """Return a seed for one item or batch of a run with seed `seed`."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] >> 1)


class Numbered(Dataset[Any]):
    """Items of a data set by their place in an epoch; each place has a seed of its own.

    So what an item looks like depends neither on the number of worker processes, nor on where an
    epoch is taken up again, nor on how its batches are shared out.
    """

    def __init__(self, items: Any, order: Tensor, seed: int, randaugment: bool) -> None:
        self.items, self.order, self.seed = items, order, seed
        self._transform = v2.RandAugment() if randaugment else None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Any:
        with seeded(mixed(self.seed, place)):
            item = self.items[int(self.order[place])]
            if self._transform is None:
                return item
            return (self._transform(torch.as_tensor(item[0])), *item[1:])


def augment(
    images: Tensor, seed: int, what: Augmentation, *, flip: bool, whole: bool = True
) -> Tensor:
    """Augment a batch.

    Args:
        images: [N, C, H, W] in [0, 1] or bytes.
        seed: of the batch.
        what: which augmentations.
        flip: whether mirrored images keep their label.
        whole: False where RandAugment, crops and flips are done already, item by item.
    """
    generator = torch.Generator().manual_seed(seed)
    if whole and what.randaugment:
        transform = v2.RandAugment()
        with seeded(seed):
            images = torch.stack([transform(image) for image in images])
    if whole and what.crop_and_flip:
        images = crop_and_flip(images, generator, flip=flip)
    if what.cutout:
        images = cut_out(images, what.cutout, generator)
    return images


def crop_and_flip(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Shift each image by up to an eighth of its size (zeros come in), and mirror half of them."""
    n, _, height, width = images.shape
    pad = max(1, height // 8)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    top = torch.randint(0, 2 * pad + 1, (n, 1), generator=generator)
    left = torch.randint(0, 2 * pad + 1, (n, 1), generator=generator)
    rows = (top + torch.arange(height)).to(images.device)
    columns = (left + torch.arange(width)).to(images.device)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator).to(images.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    which = torch.arange(n, device=images.device).view(n, 1, 1)
    picked = padded.permute(0, 2, 3, 1)[which, rows.unsqueeze(2), columns.unsqueeze(1)]
    return plain_layout(picked.permute(0, 3, 1, 2))


def cut_out(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Set a square of each image to zero; its centre is anywhere in the image."""
    n, _, height, width = images.shape

    def inside(size: int) -> Tensor:
        first = torch.randint(0, size, (n, 1), generator=generator) - side // 2
        places = torch.arange(size)
        return ((places >= first) & (places < first + side)).to(images.device)

    hole = inside(height).view(n, 1, height, 1) & inside(width).view(n, 1, 1, width)
    return images.masked_fill(hole, 0)
