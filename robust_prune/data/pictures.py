"""Images without labels: a user's own pictures, and stand-ins made of photographs at hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from robust_prune.data.datasets import NO_LABEL, Size
from robust_prune.data.photographs import crops
from robust_prune.data.splits import ITERABLE_BYTES, DataSplits, Split, check_batch, plain_loader
from robust_prune.errors import DataError


class Unlabelled(Dataset[tuple[Tensor, int]]):
    """The images of a data set of images alone, with `NO_LABEL` for each."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], NO_LABEL


def stand_ins(model: nn.Module, size: Size, n: int, seed: int) -> DataSplits:
    """Return photographs in place of data, labelled by the model itself.

    Args:
        model: whose verdicts become the labels, at the time they are read.
        size: (channels, height, width) that it takes.
        n: how many images.
        seed: of every draw.
    """
    images = crops(n, size, seed)
    return DataSplits(
        name="stand-in photographs",
        train=Split(Unlabelled(images), in_memory=True, labeller=model),
        validation=None,
        test=None,
        classes=0,
        input_size=size,
        origin="stand-in photographs",
    )


def without_labels(data: Any, labeller: nn.Module) -> tuple[Split | None, Any]:
    """Wrap data that holds images alone; the labels are then the verdicts of `labeller`.

    Args:
        data: a tensor [N, C, H, W], a data set or a loader of images, or an iterable of images
            [C, H, W] or of batches of them.
        labeller: takes these images.

    Returns:
        The split, and None; or None, and the data to read on with, where labels are there.

    Raises:
        DataError: too many images to hold, or not images.
    """
    if isinstance(data, Tensor):
        return _held([data], labeller), None
    if isinstance(data, DataLoader) and plain_loader(data):
        if _of_images(data.dataset):
            return Split(
                Unlabelled(data.dataset), workers=data.num_workers, labeller=labeller
            ), None
        return None, data
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        whole = _of_images(data)
        return (Split(Unlabelled(data), labeller=labeller), None) if whole else (None, data)
    if isinstance(data, Split) or not isinstance(data, Iterable) or _two_tensors(data):
        return None, data
    batches = iter(data)
    first = next(batches, None)
    if first is None:
        return None, ()
    batches = itertools.chain([first], batches)
    return (_held(batches, labeller), None) if isinstance(first, Tensor) else (None, batches)


def _two_tensors(data: Any) -> bool:
    """Whether this is (images, labels), and not two images."""
    pair = isinstance(data, (tuple, list)) and len(data) == 2
    return pair and isinstance(data[0], Tensor) and getattr(data[1], "ndim", 0) == 1


def _of_images(dataset: Any) -> bool:
    return len(dataset) > 0 and isinstance(dataset[0], Tensor)


def _held(batches: Iterable[Any], labeller: nn.Module) -> Split:
    """Hold images in memory."""
    parts, size = [], 0
    for batch in batches:
        if not isinstance(batch, Tensor):
            raise DataError(f"images without labels are tensors, not a {type(batch).__name__}")
        images = batch.unsqueeze(0) if batch.ndim == 3 else batch
        images, _ = check_batch((images, torch.full((len(images),), NO_LABEL)))
        parts.append(images)
        size += images.numel() * images.element_size()
        if size > ITERABLE_BYTES:
            raise DataError(
                f"the iterable holds more than {ITERABLE_BYTES >> 30} GiB of images; give a "
                "data set, or a folder with --calibration, which are read batch by batch"
            )
    sizes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(sizes) > 1:
        raise DataError(
            f"images have several sizes, as {list(sizes[0])} and {list(sizes[1])}; resize them to "
            "what the model takes, or give the folder to --calibration"
        )
    if not parts:
        raise DataError("the data holds no images")
    return Split(Unlabelled(torch.cat(parts)), in_memory=True, labeller=labeller)
