"""Arrays, items and labels as users have them: the same images, or one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from robust_prune.data import as_split
from robust_prune.errors import DataError

IMAGES = np.random.default_rng(0).random((6, 3, 8, 8), dtype=np.float32)
LABELS = np.arange(6) % 3


def read_only(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


ARRAYS: dict[str, tuple[Any, Any]] = {
    "another byte order": (IMAGES.astype(">f4"), LABELS.astype(">i8")),
    "negative strides": (IMAGES[:, ::-1].copy()[:, ::-1], LABELS[::-1].copy()[::-1]),
    "read only": (read_only(IMAGES), read_only(LABELS)),
    "long doubles": (IMAGES.astype(np.longdouble), LABELS.astype(np.uint16)),
    "a gradient": (torch.tensor(IMAGES, requires_grad=True), LABELS),
    "a sparse tensor": (torch.tensor(IMAGES).to_sparse(), LABELS),
    "a list of labels": (torch.tensor(IMAGES), LABELS.tolist()),
    "a tuple of labels": (IMAGES, tuple(LABELS.tolist())),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", list(ARRAYS))
def test_the_same_images_come_out_of_any_array(name: str) -> None:
    found = as_split(ARRAYS[name])
    images, labels = next(found.batches(6))
    assert torch.equal(images, torch.tensor(IMAGES))
    assert labels.tolist() == LABELS.tolist()


class Items(Dataset[Any]):
    def __init__(self, give: Callable[[int], Any]) -> None:
        self.give = give

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return self.give(index)


class NoLength(Dataset[Any]):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor(IMAGES[index]), 0


def picture(index: int) -> Image.Image:
    return Image.fromarray((IMAGES[index].transpose(1, 2, 0) * 255).astype(np.uint8))


WRONG: dict[str, tuple[Any, str]] = {
    "objects": ((IMAGES.astype(object), LABELS), "images must be numbers, not .* object"),
    "complex images": ((IMAGES.astype(complex), LABELS), "images must be numbers"),
    "class names": ((IMAGES, np.array(["a", "b", "c"])[LABELS]), "labels must be numbers"),
    "labels as floats": ((IMAGES, LABELS.astype(float)), r"6 integers, not \[6\] of float64"),
    "too few labels": ((IMAGES, LABELS[:4]), r"6 integers, not \[4\] of int64"),
    "labels of several lengths": ((IMAGES, [[0], [1, 2]] * 3), "labels can't be put into one"),
    "pictures": (Items(lambda i: (picture(i), 0)), "put together in batches.*tensor"),
    "a loader of pictures": (DataLoader(Items(lambda i: (picture(i), 0))), "in batches"),
    "no labels": (Items(lambda i: (IMAGES[i], None)), "put together in batches"),
    "names as labels": (Items(lambda i: (IMAGES[i], "cat")), "labels must be numbers"),
    "several sizes": (Items(lambda i: (torch.rand(3, 8 + i, 8), 0)), "all of one size"),
    "no length": (NoLength(), "a NoLength, has no __len__"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_makes_no_batch_is_one_line(name: str) -> None:
    data, message = WRONG[name]
    with pytest.raises(DataError, match=message) as caught:
        as_split(data).take(4, seed=0)
    assert "\n" not in str(caught.value)
