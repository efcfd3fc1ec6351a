"""Readers of data sets in their own layouts: items of (PIL image, label)."""

from __future__ import annotations

import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import (
    Dataset,
)
from torchvision.transforms import v2

from robust_prune.data.samples import sample_digits
from robust_prune.errors import DataError

Size = tuple[int, int, int]
GREY_MODES = ("1", "L", "LA")
NO_LABEL = -1
MOST_PIXELS = 100_000_000  # 300 MB as bytes
# what PIL's decoders raise on files that are cut, damaged or made to harm
BROKEN = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    OverflowError,
)


@dataclass(frozen=True)
class Parts:
    """Items of (PIL image, label) for training and testing."""

    train: Any
    test: Any
    classes: int
    flip: bool = True
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()  # of folders, in the order of labels


class ImageTensors(Dataset[tuple[Tensor, int]]):
    """Items of (PIL image, label) as uint8 tensors [C, H, W] of one size."""

    def __init__(self, items: Any, size: Size, training: bool, flip: bool) -> None:
        self.items = items
        self.mode = "L" if size[0] == 1 else "RGB"
        if size[0] not in (1, 3):
            raise DataError(f"images have 1 or 3 channels, the model wants {size[0]}")
        square = list(size[1:])
        if training:
            steps: list[Any] = [v2.RandomResizedCrop(square, scale=(0.35, 1.0), antialias=True)]
            steps += [v2.RandomHorizontalFlip()] if flip else []
        else:
            steps = [v2.Resize(min(square), antialias=True), v2.CenterCrop(square)]
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.items[index]
        pixels = np.array(self.transform(image.convert(self.mode)), dtype=np.uint8)
        tensor = torch.from_numpy(pixels)
        tensor = tensor.unsqueeze(0) if self.mode == "L" else tensor.permute(2, 0, 1)
        return tensor.contiguous(), int(label)


class Files(Dataset[tuple[Image.Image, int]]):
    """Image files with labels."""

    def __init__(self, samples: list[tuple[Path, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(path) as image:
                    _check_pixels(path, image)
                    upright = ImageOps.exif_transpose(image)
                    return _eight_bit(path, _opaque(upright)), label
        except BROKEN as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{path}: can't be decoded: {line}") from None


def _check_pixels(path: Path, image: Image.Image) -> None:
    """Raise before a picture is decoded that would take too much memory."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise DataError(
            f"{path}: {width} x {height} pixels are more than {MOST_PIXELS:,}; make it smaller"
        )


def _opaque(image: Image.Image) -> Image.Image:
    """Return the image on white where it is transparent, as viewers show it."""
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image
    coloured = image.convert("RGBA")
    if coloured.getchannel("A").getextrema() == (255, 255):
        return image
    shown = Image.alpha_composite(Image.new("RGBA", image.size, "white"), coloured)
    return shown.convert("L") if image.mode in GREY_MODES else shown


def _eight_bit(path: Path, image: Image.Image) -> Image.Image:
    """Return the image in mode L or RGB; wider grey values are scaled, PIL would clip them."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image.convert("L" if image.mode in GREY_MODES else "RGB")
    white = 1 if image.mode == "F" else 65535
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):
        raise DataError(
            f"{path}: grey values of mode {image.mode} must lie in 0..{white}, but go from {low:g} "
            f"to {high:g}; save the image with 8 or 16 bits"
        )
    return Image.fromarray(np.round(values * (255 / white)).astype(np.uint8))


def native_size(parts: Parts) -> Size:
    """The size all of the first images share; 224x224 where they differ, as ImageNet's do."""
    images = [parts.train[i][0] for i in range(min(16, len(parts.train)))]
    sizes = {image.size for image in images}
    channels = 1 if all(image.mode == "L" for image in images) else 3
    width, height = sizes.pop() if len(sizes) == 1 else (224, 224)
    if parts.flip is False and (height, width) == (8, 8):
        height = width = 32  # digits: no network of the zoo takes 8x8
    return channels, height, width


def read_digits() -> Parts:
    """scikit-learn's 1,797 handwritten digits; the last 500 are by other writers and test."""
    bunch = sample_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    items = [(Image.fromarray(p), int(y)) for p, y in zip(pixels, bunch.target, strict=True)]
    return Parts(items[:-500], items[-500:], classes=10, flip=False)


def read_torchvision(name: str, root: Path, download: bool) -> Parts:
    """CIFAR-10, CIFAR-100 or SVHN through torchvision, which checks the files' sums."""

    def build(train: bool) -> Any:
        if name == "svhn":
            split = "train" if train else "test"
            return torchvision.datasets.SVHN(str(root), split=split, download=download)
        cls = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
        return cls(str(root), train=train, download=download)

    try:
        train, test = build(True), build(False)
    except (RuntimeError, OSError) as error:
        hint = "the download failed" if download else "add --download, or name it by --data-root"
        line = str(error).splitlines()[0]
        raise DataError(f"{name} is not complete under {root} ({line}); {hint}") from None
    return Parts(train, test, classes=100 if name == "cifar100" else 10, flip=name != "svhn")
