"""Readers of data sets in their own layouts: items of (PIL image, label)."""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
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
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
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


def read_image_folder(path: Path) -> Parts:
    """train/<class>/ and, for testing, the first of test, val, validation with labelled images."""
    folders = {d.name for d in path.iterdir() if d.is_dir()}
    there = [name for name in ("test", "val", "validation") if name in folders]
    if "train" not in folders:
        found = ", ".join(sorted(folders)[:5]) or "no folders"
        raise DataError(
            f"{path}: an image folder needs train/<class>/, and test/<class>/ or val/<class>/ to "
            f"measure on; there is {found}; pictures without classes are for --calibration"
        )
    classes = _class_names(path / "train")
    if not classes:
        raise DataError(f"{path / 'train'}: no class folders in it")
    if not there:
        return Parts(
            Files(_list_training(path, classes)),
            (),
            classes=len(classes),
            notes=(
                "there is no test/ or val/ beside train/: nothing is measured on test images",
                *order_note(classes),
            ),
            class_names=tuple(classes),
        )
    labelled = (name for name in there if _any_image(path / name, classes))
    testing = next(labelled, there[0])
    other = _class_names(path / testing)
    if unknown := sorted(set(other) - set(classes)):
        raise DataError(f"{path / testing}: class {unknown[0]!r} is not in train/")
    notes: tuple[str, ...] = (f"test images come from {testing}/",)
    for name in there[: there.index(testing)]:
        notes += (f"{name}/ has no images in folders called as those of train/",)
    if missing := sorted(set(classes) - set(other)):
        warnings.warn(f"{path / testing}: no images of class {missing[0]!r}", stacklevel=2)
        notes += (f"{len(missing)} classes have no test images",)
    return Parts(
        Files(_list_training(path, classes)),
        Files(_list_files(path / testing, [c for c in classes if c in other], classes)),
        classes=len(classes),
        notes=(*notes, *order_note(classes)),
        class_names=tuple(classes),
    )


def _list_training(path: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    train = _list_files(path / "train", classes)
    if empty := sorted(set(range(len(classes))) - {label for _, label in train}):
        raise DataError(
            f"{path / 'train' / classes[empty[0]]}: no images in this class folder; add some, or "
            "delete it"
        )
    return train


def read_pictures(path: Path) -> Parts:
    """All pictures below a folder, without labels."""
    if not path.is_dir():
        raise DataError(f"{path}: no such folder of pictures")
    files = [file for file in sorted(_visible(path)) if _is_image(file)]
    if not files:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{path}: no pictures in it ({suffixes})")
    return Parts(Files([(file, NO_LABEL) for file in files]), (), classes=0)


def _class_names(folder: Path) -> list[str]:
    """Return class folders in the order of their labels: by number where all are numbers."""
    names = [d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith(".")]
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def order_note(names: Sequence[str]) -> tuple[str, ...]:
    """Return a note where class names hold numbers that the order of labels does not follow."""
    by_number = sorted(
        names, key=lambda n: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", n)]
    )
    if by_number == list(names):
        return ()
    return (
        "labels are in the alphabetical order of class folders, as torchvision has it "
        f"({', '.join(names[:3])} ...), not in that of their numbers ({', '.join(by_number[:3])} "
        "...), as timm has it",
    )


def _any_image(folder: Path, names: Sequence[str]) -> bool:
    return any(_is_image(file) for name in names for file in _visible(folder / name))


def _visible(folder: Path) -> Iterator[Path]:
    """What a class folder holds, but for hidden files and what lies in hidden folders."""
    for file in folder.rglob("*"):
        if not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _list_files(
    folder: Path, names: Sequence[str], classes: Sequence[str] | None = None
) -> list[tuple[Path, int]]:
    labels = {name: i for i, name in enumerate(classes or names)}
    samples = [
        (file, labels[name])
        for name in names
        for file in sorted(_visible(folder / name))
        if _is_image(file)
    ]
    if not samples:
        raise DataError(f"{folder}: no images in its class folders")
    return samples


def read_tiny_imagenet(path: Path) -> Parts:
    """The original layout: train/<wnid>/images, and val/images with val_annotations.txt."""
    wnids = (path / "wnids.txt").read_text(encoding="utf-8").split()
    annotations = path / "val" / "val_annotations.txt"
    if not annotations.exists():
        raise DataError(f"{annotations}: missing; is it the original tiny-imagenet-200 layout?")
    labels = {wnid: i for i, wnid in enumerate(sorted(wnids))}
    test = []
    for line in annotations.read_text(encoding="utf-8").splitlines():
        fields = line.split("\t")
        if len(fields) >= 2 and fields[1] in labels:
            test.append((path / "val" / "images" / fields[0], labels[fields[1]]))
    if not test:
        raise DataError(f"{annotations}: no line names a class of wnids.txt")
    train = _list_files(path / "train", sorted(wnids))
    notes = ("test images are the annotated val/ images; the original test/ has no labels",)
    return Parts(
        Files(train),
        Files(test),
        classes=len(wnids),
        notes=notes,
        class_names=tuple(sorted(wnids)),
    )
