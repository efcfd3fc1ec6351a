"""The test images that every model of a comparison is judged on."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from robust_prune.data import DataSplits, Split, as_split, open_for
from robust_prune.errors import DataError, UsageError


@dataclass(frozen=True)
class TestImages:
    """Images [n, C, H, W] drawn once, so that every model is judged on the same ones.

    `classes` is 0 where it is not known; `begin` counts the images of earlier rounds.
    """

    __test__ = False  # not a test class of pytest's

    images: Tensor
    labels: Tensor
    split: str
    seed: int
    classes: int = 0
    begin: int = 0


def draw(split: Split, n: int, seed: int, *, name: str = "test", begin: int = 0) -> TestImages:
    """Draw `n` images without replacement; fewer where the split is smaller.

    `begin` of them, which a draw before has given by the same seed, are left out.
    """
    if n < 1:
        raise UsageError(f"the number of images to evaluate on must be at least 1, not {n}")
    if len(split) == 0:
        raise DataError(f"the {name} split holds no images")
    images, labels = split.take(min(begin + n, len(split)), seed)
    if len(images) <= begin:
        raise DataError(f"the {name} split holds {len(split)} images; {begin} are drawn already")
    rest = images[begin:].cpu(), labels[begin:].cpu()
    return TestImages(*rest, name, seed, split.classes, begin)


def test_images(model: nn.Module, data_: Any, n: int, seed: int) -> TestImages:
    """Return the images that `evaluate` measures on when it is given `data_`."""
    if isinstance(data_, TestImages):
        return data_
    split, name, classes = drawn_from(model, data_)
    test = draw(split, n, seed, name=name)
    return replace(test, classes=classes or test.classes)


def drawn_from(model: nn.Module, data_: Any) -> tuple[Split, str, int]:
    """Return what test images are drawn from, its name, and its classes, 0 if they aren't known.

    Raises:
        UsageError: the images were drawn already.
        DataError: the data has no test split.
    """
    if isinstance(data_, TestImages):
        raise UsageError(
            f"{len(data_.labels)} test images were drawn already; give the data that they are from"
        )
    if not isinstance(data_, (str, os.PathLike, DataSplits)):
        return as_split(data_), "the caller's", 0
    splits = open_for(model, data_)
    if splits is None or splits.test is None:
        raise DataError(f"{data_}: no test split")
    return splits.test, "test", splits.classes
