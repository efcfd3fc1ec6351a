"""Images that are held in memory as bytes, each decoded when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from robust_prune.errors import DataError

DECODED_AT_ONCE = 512


class Held:
    """The items of a data set that were asked for so far.

    Attributes:
        images: [n, C, H, W] of all n items, in bytes where that loses nothing; None before the
            first one is read.
        labels: of all items.
    """

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate
        self.images: Tensor | None = None
        self.labels: Tensor | None = None
        self._read = torch.zeros(len(dataset), dtype=torch.bool)  # type: ignore[arg-type]

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return images [N, C, H, W] in [0, 1], or as the data set gives them, and labels [N].

        Raises:
            DataError: items differ in size.
        """
        self.read_(places)
        if self.images is None or self.labels is None:
            raise DataError("a batch holds no images")
        return in_floats(self.images[places]), self.labels[places]

    def read_(self, places: Tensor) -> None:
        """Decode what is not held yet of these items, in the order of the data set."""
        missing = torch.unique(places[~self._read[places]])
        if not len(missing):
            return
        parts = torch.split(missing, DECODED_AT_ONCE)
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=[part.tolist() for part in parts],
            collate_fn=self.collate,
            generator=torch.Generator(),  # the global one stays as it is
        )
        for part, (images, labels) in zip(parts, loader, strict=True):
            self._put_(part, in_bytes(images), labels)

    def _put_(self, places: Tensor, images: Tensor, labels: Tensor) -> None:
        if self.images is None or self.labels is None:
            self.images = images.new_empty(len(self._read), *images.shape[1:])
            self.labels = labels.new_empty(len(self._read), *labels.shape[1:])
        if images.shape[1:] != self.images.shape[1:]:
            first, other = list(self.images.shape[1:]), list(images.shape[1:])
            raise DataError(f"the data set's images have several sizes, as {first} and {other}")
        if images.dtype != self.images.dtype:  # bytes do not do for all of them
            self.images, images = in_floats(self.images), in_floats(images)
        self.images[places], self.labels[places] = images, labels
        self._read[places] = True


def in_bytes(images: Tensor) -> Tensor:
    """Return images in [0, 1] as 0 to 255, a quarter of their size, if `in_floats` undoes that."""
    if images.dtype != torch.float32:
        return images
    bytes_ = (255 * images).round().clamp(0, 255).to(torch.uint8)
    return bytes_ if torch.equal(in_floats(bytes_), images) else images


def in_floats(images: Tensor) -> Tensor:
    """Return images of bytes in [0, 1]; others as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images
