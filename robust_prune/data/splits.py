"""Images with labels, read in batches: one split, and the three that belong together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from robust_prune.data.arrays import tensor_of
from robust_prune.data.augmentation import Augmentation, Numbered, augment, mixed
from robust_prune.data.datasets import Size
from robust_prune.data.held import Held
from robust_prune.errors import DataError, first_line
from robust_prune.modules import plain_layout, predict

T = TypeVar("T")
Origin = Literal["training data", "own pictures", "stand-in photographs"]
IN_MEMORY_BYTES = 2 << 30
ITERABLE_BYTES = 4 << 30
LABELLED_AT_ONCE = 64


class Split:
    """Images in [0, 1] with labels, read in batches, in order or shuffled by a seed.

    Images of small data sets are decoded once and kept as bytes; large ones are read by worker
    processes. Where a `labeller` is given the data has no labels, and the model's verdicts take
    their place.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        in_memory: bool = False,
        flip: bool = True,
        workers: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        training_view: Dataset[Any] | None = None,
        classes: int = 0,
        labeller: nn.Module | None = None,
    ) -> None:
        self.labeller = labeller
        self.dataset = dataset
        self.classes = classes  # 0 where it is not known
        self.flip = flip
        self.workers = workers
        self._collate = together if collate in (None, default_collate) else collate
        self._training_view = training_view
        self._held = Held(dataset, self._collate) if in_memory else None

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        augment: Augmentation | None = None,
        limit: int | None = None,
        start: int = 0,
        share: tuple[int, int] = (0, 1),
        verdicts: bool = True,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images [N, C, H, W] in [0, 1] and labels [N].

        Args:
            batch_size: images at a time; the last batch holds the rest.
            seed: shuffle by this seed; None keeps the order.
            augment: what to do to the images, by the same seed.
            limit: stop after this many images.
            start: begin with this batch, counted from 0; the rest is as if all had been read.
            share: (i, n) yields every n-th image of each batch, from its i-th on.
            verdicts: False leaves images without labels so, where labels are not looked at.
        """
        order = torch.arange(len(self))
        if seed is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        order = order[:limit]
        first, step = share
        places = [chunk[first::step] for chunk in torch.split(torch.arange(len(order)), batch_size)]
        if self._held is None:
            read = self._from_workers(order, places, start, seed or 0, augment)
        else:
            read = self._from_memory(self._held, order, places, start, seed or 0, augment)
        for images, labels in read:
            if verdicts and self.labeller is not None:
                labels = predict(self.labeller, images, LABELLED_AT_ONCE)
            yield images, labels

    def decode(self) -> None:
        """Decode all images that are to be held, so that a damaged one is found now."""
        if self._held is not None:
            self._held.read_(torch.arange(len(self)))

    @property
    def in_memory(self) -> bool:
        """Whether images are decoded once, and held."""
        return self._held is not None

    def take(self, n: int, seed: int, *, verdicts: bool = True) -> tuple[Tensor, Tensor]:
        """Return `n` images [n, C, H, W] in [0, 1] and labels [n], drawn without replacement.

        `verdicts` as `batches` has it.
        """
        if len(self) == 0:
            raise DataError("the split holds no images")
        batches = list(self.batches(256, seed=seed, limit=n, verdicts=verdicts))
        return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])

    def _from_memory(
        self,
        held: Held,
        order: Tensor,
        places: Sequence[Tensor],
        start: int,
        seed: int,
        augmentation: Augmentation | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for i, batch in enumerate(places[start:], start):
            images, labels = held.at(order[batch])
            if augmentation is not None:
                # by the first place, so that processes that share a batch draw differently
                own = mixed(seed, int(batch[0]) if len(batch) else i)
                images = augment(images, own, augmentation, flip=self.flip)
            yield check_batch((images, labels))

    def _from_workers(
        self,
        order: Tensor,
        places: Sequence[Tensor],
        start: int,
        seed: int,
        augmentation: Augmentation | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        crops = augmentation is not None and augmentation.crop_and_flip
        view = self._training_view if crops and self._training_view else self.dataset
        randaugment = augmentation is not None and augmentation.randaugment
        loader: DataLoader[Any] = DataLoader(
            Numbered(view, order, seed, randaugment),
            batch_sampler=[batch.tolist() for batch in places[start:]],
            num_workers=self.workers,
            collate_fn=self._collate,
            generator=torch.Generator().manual_seed(seed),
        )
        for batch, chunk in zip(_of_workers(loader), places[start:], strict=True):
            images, labels = check_batch(batch)
            if augmentation is not None:
                own = mixed(seed, int(chunk[0]))
                images = augment(images, own, augmentation, flip=self.flip, whole=False)
            yield images, labels


def _of_workers(loader: Iterable[T]) -> Iterator[T]:
    """Give a loader's batches; what a worker could not read is said as without workers."""
    try:
        yield from loader
    except DataError as error:  # torch puts the worker's whole traceback into the text
        raise DataError(str(error).rpartition(f"{DataError.__name__}: ")[2].strip()) from None


@dataclass(frozen=True)
class DataSplits:
    """A data set: what may be trained on, what selects, and what is only ever measured on.

    `source` is all that is needed to open the same splits again; it is stored with a model.
    `classes` is 0 where it is not known. `origin` says what kind of images these are.
    """

    name: str
    train: Split
    validation: Split | None
    test: Split | None
    classes: int
    input_size: Size
    source: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    origin: Origin = "training data"

    @property
    def labelled(self) -> bool:
        """Whether the labels are the data's own, and not the dense model's verdicts."""
        return self.origin == "training data"

    @property
    def in_distribution(self) -> bool:
        """Whether these are images of the kind that the model is for."""
        return self.origin != "stand-in photographs"

    def described(self) -> dict[str, Any]:
        """Return what tells these images from others: source, numbers, and a digest of a few."""
        images, labels = self.train.take(min(16, len(self.train)), seed=0)
        few = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes())
        return {
            **self.source,
            "images": [len(s) if s else 0 for s in (self.train, self.validation, self.test)],
            "digest": few.hexdigest()[:12],
        }

    def statistics(self, n: int = 2000) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation per channel of up to `n` training images."""
        images, _ = self.train.take(min(n, len(self.train)), seed=0)
        mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3)).clamp_min(1e-3)
        return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())


def together(items: list[Any]) -> Any:
    """Return a batch of a data set's items, or say why they make none."""
    try:
        return default_collate(items)
    except (TypeError, RuntimeError) as error:
        raise DataError(
            f"the data set's items can't be put together in batches: {first_line(error)}; each "
            "must be an image as a tensor [C, H, W], all of one size, with its label as a number"
        ) from None


def _class_indices(labels: Tensor) -> Tensor:
    """Return [N] of labels as people also have them: a column [N, 1], or one-hot rows [N, K]."""
    if labels.ndim != 2:
        return labels
    if labels.shape[1] == 1:
        return labels[:, 0]
    one_hot = ((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all()
    return labels.argmax(1) if one_hot else labels


def check_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """Return float32 images [N, C, H, W] in [0, 1] and int64 labels [N], or say what is wrong."""
    try:
        images, labels = batch[0], batch[1]
        shape = tuple(images.shape)
    except (TypeError, IndexError, KeyError, AttributeError):
        raise DataError(f"a batch must be (images, labels), not a {type(batch).__name__}") from None
    if len(shape) != 4:
        raise DataError(f"images must be [N, C, H, W], not {list(shape)}")
    images = tensor_of(images, "images")
    if 0 in shape:
        raise DataError(f"a batch holds no images: its shape is {list(shape)}")
    if images.dtype == torch.uint8:
        images = images.float() / 255
    if not images.is_floating_point():
        raise DataError(f"images must be float in [0, 1] or uint8, not {images.dtype}")
    images = images.float()
    low, high = (float(v) for v in torch.aminmax(images))
    if not (low >= -1e-4 and high <= 1 + 1e-4):
        raise DataError(
            f"images must lie in [0, 1], but a batch spans [{low:.3g}, {high:.3g}]; leave the "
            "normalisation to the model (mean and std), attacks need the true range"
        )
    labels = _class_indices(tensor_of(labels, "labels"))
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) != shape[0]:
        kind = str(labels.dtype).removeprefix("torch.")
        raise DataError(f"labels must be {shape[0]} integers, not {list(labels.shape)} of {kind}")
    return plain_layout(images.clamp(0, 1)), labels.long()


def plain_loader(loader: DataLoader[Any]) -> bool:
    """Whether a loader gives every item of its data set once; others are read as they iterate."""
    return not isinstance(loader.dataset, IterableDataset) and (
        isinstance(loader.sampler, (SequentialSampler, RandomSampler))
        and not getattr(loader.sampler, "replacement", False)
        and len(loader.sampler) == len(loader.dataset)  # type: ignore[arg-type]
        and type(loader.batch_sampler) is BatchSampler
    )
