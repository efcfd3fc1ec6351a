"""Data sets by name or folder, and a user's own, as train, validation and test splits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from robust_prune.data.columns import is_hugging_face
from robust_prune.data.datasets import (
    ImageTensors,
    Parts,
    Size,
    native_size,
)
from robust_prune.data.folders import read_image_folder, read_pictures, read_tiny_imagenet
from robust_prune.data.named import read_named
from robust_prune.data.pictures import without_labels
from robust_prune.data.skipping import without_unreadable
from robust_prune.data.splits import (
    IN_MEMORY_BYTES,
    ITERABLE_BYTES,
    DataSplits,
    Split,
    check_batch,
    plain_loader,
)
from robust_prune.errors import DataError, UsageError
from robust_prune.files import is_folder
from robust_prune.modules import ImageModel, image_channels
from robust_prune.types import DATA_NAMES

VALIDATION_SHARE, VALIDATION_MOST = 0.1, 2000
FEWEST_TO_SHARE = 20  # of fewer images none are kept back for validation


def open_data(
    spec: Any,
    *,
    input_size: Size | None = None,
    channels: int | None = None,
    data_root: str | os.PathLike[str] | None = None,
    download: bool = False,
    workers: int | None = None,
    skip_unreadable: bool = False,
    split_seed: int = 0,
) -> DataSplits:
    """Open a data set by name (`digits`, `torch/mnist`, `hfds/NAME` ...) or by folder.

    Args:
        spec: the name, a data set of Hugging Face, an ImageFolder directory with train/ and test/
            or val/, or a tiny-imagenet-200 directory in its original layout.
        input_size: (channels, height, width) to give; None keeps the data set's own.
        channels: 1 for grey or 3 for colour, where `input_size` is None.
        data_root: where torchvision's data sets lie.
        download: let torchvision fetch a missing data set.
        workers: processes that decode large data sets; None: half the cores.
        skip_unreadable: leave out pictures of a folder that can't be decoded, instead of raising;
            `notes` and `source` say how many.
        split_seed: which training images become the validation split. It belongs to the data, not
            to a run, so that a model is never selected on what it was trained on before.

    Raises:
        DataError: nothing there, or a layout that is none of the above.
    """
    workers = _workers(workers)
    root = Path(data_root) if data_root else Path.home() / ".cache" / "robust-prune"
    found = read_named(spec, root, download)
    if found is not None:
        name, parts, source = found
    else:
        path = Path(spec)
        if not is_folder(path):
            raise DataError(
                f"data {str(spec)!r} is neither a folder nor one of {', '.join(DATA_NAMES)}; an "
                "image folder needs train/<class>/ and test/<class>/ or val/<class>/"
            )
        name = path.resolve().name
        parts = (
            read_tiny_imagenet(path) if (path / "wnids.txt").exists() else read_image_folder(path)
        )
        source = {"data": str(path.resolve())}
        if skip_unreadable:
            parts, source["left_out"] = without_unreadable(parts)
    if parts.class_names:
        source["class_names"] = list(parts.class_names)
    size = _size_of(parts, input_size, channels)
    source["input_size"], source["split_seed"] = list(size), split_seed
    return DataSplits(
        name=name,
        **_splits(parts, size, workers, split_seed),
        classes=parts.classes,
        input_size=size,
        source=source,
        notes=parts.notes,
    )


def open_pictures(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    input_size: Size | None = None,
    workers: int | None = None,
    skip_unreadable: bool = False,
    split_seed: int = 0,
) -> DataSplits:
    """Open all pictures below a folder as images without labels, which the model then gives.

    Args:
        folder: pictures of any sizes, in any folders below it.
        model: whose verdicts become the labels.
        input_size: (channels, height, width), where the model does not tell.
        workers: processes that decode large numbers of them; None: half the cores.
        skip_unreadable: leave out those that can't be decoded, and say how many.
        split_seed: which pictures are held out of training.

    Raises:
        DataError: no such folder, or no pictures in it.
    """
    path = Path(folder)
    parts, left_out = read_pictures(path), None
    if skip_unreadable:
        parts, left_out = without_unreadable(parts)
    known = model.spec.input_size if isinstance(model, ImageModel) else None
    size = _size_of(parts, known or input_size, image_channels(model))
    workers = _workers(workers)
    return DataSplits(
        name=path.resolve().name,
        **_splits(parts, size, workers, split_seed, labeller=model),
        classes=0,
        input_size=size,
        source={
            "pictures": str(path.resolve()),
            "input_size": list(size),
            "split_seed": split_seed,
            **({} if left_out is None else {"left_out": left_out}),
        },
        notes=parts.notes,
        origin="own pictures",
    )


def _workers(asked: int | None) -> int:
    return max(1, (os.cpu_count() or 2) // 2) if asked is None else asked


def _size_of(parts: Parts, given: Size | None, channels: int | None) -> Size:
    native = native_size(parts)
    return given or (channels or native[0], *native[1:])


def _splits(
    parts: Parts,
    size: Size,
    workers: int,
    split_seed: int,
    labeller: nn.Module | None = None,
) -> dict[str, Any]:
    """Return train, validation and test; where images are few none are held out."""
    few = len(parts.train) < FEWEST_TO_SHARE
    kept = (None, None) if few else _carve(len(parts.train), split_seed)

    def split(dataset: Any, indices: Sequence[int] | None) -> Split:
        def view(training: bool) -> Dataset[Any]:
            images = ImageTensors(dataset, size, training, parts.flip)
            return images if indices is None else Subset(images, indices)

        count = len(dataset) if indices is None else len(indices)
        return Split(
            view(False),
            in_memory=count * size[0] * size[1] * size[2] <= IN_MEMORY_BYTES,
            flip=parts.flip,
            workers=workers,
            training_view=view(True),
            classes=parts.classes,
            labeller=labeller,
        )

    return {
        "train": split(parts.train, kept[0]),
        "validation": None if few else split(parts.train, kept[1]),
        "test": split(parts.test, None) if len(parts.test) else None,
    }


def from_iterable(
    data: Any,
    *,
    test: Any = None,
    split_seed: int = 0,
    validation: bool = True,
    labeller: nn.Module | None = None,
) -> DataSplits:
    """Make splits of a user's own data: a loader, a data set, tensors, or (images, labels) batches.

    A DataLoader is read lazily with its own workers and collate function; any other iterable is
    read once into memory. One tenth is kept back for validation; `test` is only measured on. Where
    there is a `labeller` the data may be images alone: its verdicts are the labels then.

    Raises:
        DataError: images outside [0, 1], or an iterable too large to hold.
    """
    whole = as_split(data, labeller)
    if len(whole) == 0:
        raise DataError("the data holds no images")
    images, _ = next(whole.batches(2, verdicts=False))
    if validation and len(whole) >= FEWEST_TO_SHARE:
        first, second = _carve(len(whole), split_seed)
        train, held_out = _subset(whole, first), _subset(whole, second)
    else:
        train, held_out = whole, None
    channels, height, width = images.shape[1:]
    return DataSplits(
        name=f"{len(whole)} images of the caller's",
        train=train,
        validation=held_out,
        test=None if test is None else as_split(test),
        classes=0,
        input_size=(channels, height, width),
        origin="training data" if whole.labeller is None else "own pictures",
    )


def as_split(data: Any, labeller: nn.Module | None = None) -> Split:
    """Wrap a Split, a DataLoader, a data set, two tensors, or an iterable of batches.

    With a `labeller` images alone will do, in any of these forms or as one tensor.
    """
    if isinstance(data, Split):
        return data
    if labeller is not None:
        unlabelled, data = without_labels(data, labeller)
        if unlabelled is not None:
            return unlabelled
    if isinstance(data, DataLoader) and plain_loader(data):
        return Split(data.dataset, workers=data.num_workers, collate=data.collate_fn)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        if not hasattr(data, "__len__"):
            raise DataError(
                f"the data set, a {type(data).__name__}, has no __len__, so that its images can't "
                "be drawn; give it one, or make it an IterableDataset"
            )
        return Split(data)
    if isinstance(data, (tuple, list)) and len(data) == 2:
        images, labels = data
        if isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4:
            return _tensor_split(images, labels)
    if not isinstance(data, Iterable):
        raise DataError(
            f"data of type {type(data).__name__} can't be read; give a name or folder, a loader, "
            "or an iterable of (images, labels)"
        )
    parts, size = [], 0
    for batch in data:
        images, labels = check_batch(batch)
        parts.append((images, labels))
        size += images.numel() * images.element_size()
        if size > ITERABLE_BYTES:
            raise DataError(
                f"the iterable holds more than {ITERABLE_BYTES >> 30} GiB of images; give a "
                "DataLoader over a map-style data set, which is read batch by batch"
            )
    if not parts:
        raise DataError("the iterable gave no batches; a generator can be read only once")
    return _tensor_split(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


def open_for(
    model: nn.Module, source: Any, *, test: Any = None, input_size: Size | None = None
) -> DataSplits | None:
    """Open a name or folder at the model's image size, or wrap the caller's own data.

    Args:
        model: what the data is for.
        source: a name, a folder, splits, or images and labels in any form; None is no data.
        test: images and labels to measure on, in place of those of `source`.
        input_size: (channels, height, width) for a name or folder, where the model does not tell.

    Raises:
        UsageError: `test` without `source`.
    """
    if source is None:
        if test is not None:
            raise UsageError("test images are measured on only where there is data; give data too")
        return None
    if isinstance(source, DataSplits):
        return source if test is None else replace(source, test=as_split(test))
    if isinstance(source, (str, os.PathLike)) or is_hugging_face(source):
        known = model.spec.input_size if isinstance(model, ImageModel) else None
        splits = open_data(source, input_size=known or input_size, channels=image_channels(model))
        return splits if test is None else replace(splits, test=as_split(test))
    return from_iterable(source, test=test, labeller=model)


def _carve(n: int, seed: int) -> tuple[list[int], list[int]]:
    """Split the indices of the training images into training and validation."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = max(1, min(round(n * VALIDATION_SHARE), VALIDATION_MOST))
    return sorted(order[held_out:]), sorted(order[:held_out])


def _subset(split: Split, indices: list[int]) -> Split:
    return Split(
        Subset(split.dataset, indices),
        in_memory=split.in_memory,
        flip=split.flip,
        workers=split.workers,
        collate=split._collate,
        classes=split.classes,
        labeller=split.labeller,
    )


def _tensor_split(images: Any, labels: Any) -> Split:
    images, labels = check_batch((images, labels))
    return Split(torch.utils.data.TensorDataset(images, labels), in_memory=True, flip=False)
