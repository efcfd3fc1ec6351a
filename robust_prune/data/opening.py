"""Data sets by name or folder, and a user's own, as train, validation and test splits."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from robust_prune.data.datasets import (
    ImageTensors,
    Size,
    native_size,
    read_digits,
    read_image_folder,
    read_tiny_imagenet,
    read_torchvision,
)
from robust_prune.data.splits import IN_MEMORY_BYTES, DataSplits, Split, check_batch
from robust_prune.errors import DataError, UsageError
from robust_prune.modules import ImageModel, image_channels
from robust_prune.types import DATA_NAMES

ITERABLE_BYTES = 4 << 30
VALIDATION_SHARE, VALIDATION_MOST = 0.1, 2000
FEWEST_TO_SHARE = 20  # of fewer images none are kept back for validation


def open_data(
    spec: str | os.PathLike[str],
    *,
    input_size: Size | None = None,
    channels: int | None = None,
    data_root: str | os.PathLike[str] | None = None,
    download: bool = False,
    workers: int | None = None,
    split_seed: int = 0,
) -> DataSplits:
    """Open a data set by name (`digits`, `cifar10`, `cifar100`, `svhn`) or by folder.

    Args:
        spec: the name, an ImageFolder directory with train/ and test/ or val/, or a
            tiny-imagenet-200 directory in its original layout.
        input_size: (channels, height, width) to give; None keeps the data set's own.
        channels: 1 for grey or 3 for colour, where `input_size` is None.
        data_root: where torchvision's data sets lie.
        download: let torchvision fetch a missing data set.
        workers: processes that decode large data sets; None: half the cores.
        split_seed: which training images become the validation split. It belongs to the data, not
            to a run, so that a model is never selected on what it was trained on before.

    Raises:
        DataError: nothing there, or a layout that is none of the above.
    """
    name = str(spec)
    workers = max(1, (os.cpu_count() or 2) // 2) if workers is None else workers
    if name in DATA_NAMES:
        root = Path(data_root) if data_root else Path.home() / ".cache" / "robust-prune"
        parts = read_digits() if name == "digits" else read_torchvision(name, root, download)
        source: dict[str, Any] = {"data": name}
        if name != "digits":
            source["data_root"] = str(root.resolve())
    else:
        path = Path(name)
        if not path.is_dir():
            raise DataError(
                f"data {name!r} is neither a folder nor one of {', '.join(DATA_NAMES)}; an image "
                "folder needs train/<class>/ and test/<class>/ or val/<class>/"
            )
        parts = (
            read_tiny_imagenet(path) if (path / "wnids.txt").exists() else read_image_folder(path)
        )
        source = {"data": str(path.resolve())}
    if parts.class_names:
        source["class_names"] = list(parts.class_names)
    native = native_size(parts)
    size = input_size or (channels or native[0], *native[1:])
    few = len(parts.train) < FEWEST_TO_SHARE
    kept = (None, None) if few else _carve(len(parts.train), split_seed)
    source["input_size"], source["split_seed"] = list(size), split_seed

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
        )

    return DataSplits(
        name=name if name in DATA_NAMES else Path(name).resolve().name,
        train=split(parts.train, kept[0]),
        validation=None if few else split(parts.train, kept[1]),
        test=split(parts.test, None),
        classes=parts.classes,
        input_size=size,
        source=source,
        notes=parts.notes,
    )


def from_iterable(
    data: Any, *, test: Any = None, split_seed: int = 0, validation: bool = True
) -> DataSplits:
    """Make splits of a user's own data: a loader, a data set, tensors, or (images, labels) batches.

    A DataLoader is read lazily with its own workers and collate function; any other iterable is
    read once into memory. One tenth is kept back for validation; `test` is only measured on.

    Raises:
        DataError: images outside [0, 1], or an iterable too large to hold.
    """
    whole = as_split(data)
    if len(whole) == 0:
        raise DataError("the data holds no images")
    images, _ = next(whole.batches(2))
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
    )


def as_split(data: Any) -> Split:
    """Wrap a Split, a DataLoader, a data set, two tensors, or an iterable of batches."""
    if isinstance(data, Split):
        return data
    if isinstance(data, DataLoader) and _plain_loader(data):
        return Split(data.dataset, workers=data.num_workers, collate=data.collate_fn)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return Split(data)
    if isinstance(data, (tuple, list)) and len(data) == 2:
        images, labels = data
        arrays = isinstance(images, (Tensor, np.ndarray)) and hasattr(labels, "shape")
        if arrays and images.ndim == 4 and len(images) == len(labels):
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


def _plain_loader(loader: DataLoader[Any]) -> bool:
    """Whether a loader gives every item of its data set once; others are read as they iterate."""
    return not isinstance(loader.dataset, IterableDataset) and (
        isinstance(loader.sampler, (SequentialSampler, RandomSampler))
        and not getattr(loader.sampler, "replacement", False)
        and len(loader.sampler) == len(loader.dataset)  # type: ignore[arg-type]
        and type(loader.batch_sampler) is BatchSampler
    )


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
    if isinstance(source, (str, os.PathLike)):
        known = model.spec.input_size if isinstance(model, ImageModel) else None
        splits = open_data(source, input_size=known or input_size, channels=image_channels(model))
        return splits if test is None else replace(splits, test=as_split(test))
    return from_iterable(source, test=test)


def _carve(n: int, seed: int) -> tuple[list[int], list[int]]:
    """Split the indices of the training images into training and validation."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = max(1, min(round(n * VALIDATION_SHARE), VALIDATION_MOST))
    return sorted(order[held_out:]), sorted(order[:held_out])


def _subset(split: Split, indices: list[int]) -> Split:
    return Split(
        Subset(split.dataset, indices),
        in_memory=split._in_memory,
        flip=split.flip,
        workers=split.workers,
        collate=split._collate,
        classes=split.classes,
    )


def check_class_order(splits: DataSplits, recorded: Mapping[str, Any]) -> DataSplits:
    """Compare the order of class folders with that of the data a model was trained on.

    Args:
        splits: of the data that is given.
        recorded: what the model's file says of its data.

    Returns:
        The splits, with a note where the model does not say which class has which label.

    Raises:
        DataError: the same label would mean another class.
    """
    given, known = splits.source.get("class_names"), recorded.get("class_names")
    if given is None or given == known:
        return splits
    if isinstance(known, list) and known:
        pairs = list(itertools.zip_longest(given, known, fillvalue="none"))
        wrong = next(i for i, (mine, theirs) in enumerate(pairs) if mine != theirs)
        mine, theirs = pairs[wrong]
        raise DataError(
            f"{splits.name}: label {wrong} is class {mine!r} here, but {theirs!r} in the data that "
            "the model was trained on; name class folders alike"
        )
    note = (
        "the model does not say which label is which class; taken as the order of class folders: "
        f"{', '.join(f'{i} {name}' for i, name in enumerate(given[:3]))}, ..."
    )
    return replace(splits, notes=(*splits.notes, note))


def _tensor_split(images: Tensor, labels: Tensor) -> Split:
    images, labels = check_batch((images, labels))
    return Split(torch.utils.data.TensorDataset(images, labels), in_memory=True, flip=False)
