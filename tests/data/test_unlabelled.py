"""Images without labels: photographs at hand, a user's own, folders of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from robust_prune.data import from_iterable, open_data, open_for, open_pictures, stand_ins
from robust_prune.data.photographs import crops, photographs
from robust_prune.data.samples import sample_photographs
from robust_prune.errors import DataError
from robust_prune.modules import predict
from tests.conftest import tiny_resnet


class Images(Dataset[Tensor]):
    """A data set of images alone."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@pytest.mark.parametrize("size", [(1, 28, 28), (3, 32, 32), (4, 20, 24), (3, 224, 224)])
def test_crops_are_images_of_any_size_and_the_same_again(size: tuple[int, int, int]) -> None:
    images = crops(6, size, seed=3)
    assert images.shape == (6, *size)
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images, crops(6, size, seed=3))
    assert not torch.equal(images, crops(6, size, seed=4))
    assert images.flatten(1).std(1).min() > 0.01  # none is blank


def test_grey_is_the_luminance_of_the_colours() -> None:
    colour, grey = crops(4, (3, 32, 32), seed=0), crops(4, (1, 32, 32), seed=0)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    torch.testing.assert_close(grey, (colour * weights).sum(1, keepdim=True))


def test_a_crop_is_found_in_a_photograph() -> None:
    whole = min(photographs()[0].shape[1:])
    image = crops(1, (3, whole, whole), seed=0)[0]
    means = [p.mean((1, 2)) for p in photographs()]
    assert image.shape == (3, whole, whole)
    assert min(float((image.mean((1, 2)) - mean).abs().max()) for mean in means) < 0.35


def test_photographs_are_read_without_scikit_learn_as_it_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = load_sample_images().images
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sklearn.datasets", None)  # importing it fails
        found = sample_photographs()
    assert len(found) == len(expected) == 2
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_stand_ins_have_the_verdicts_of_the_model() -> None:
    model = tiny_resnet()
    splits = stand_ins(model, (3, 32, 32), 20, seed=0)
    images, labels = splits.train.take(20, seed=0)
    assert torch.equal(labels, predict(model, images))
    assert not splits.labelled
    assert not splits.in_distribution


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda images: images,
    "list of images": lambda images: list(images),
    "generator of batches": lambda images: (part for part in images.split(7)),
    "data set": Images,
    "loader": lambda images: DataLoader(Images(images), batch_size=5),
    "shuffled loader": lambda images: DataLoader(Images(images), batch_size=5, shuffle=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_alone_in_any_form(form: str) -> None:
    model, images = tiny_resnet(), torch.rand(40, 3, 32, 32)
    splits = open_for(model, FORMS[form](images))
    assert splits is not None
    assert splits.origin == "own pictures"
    assert splits.in_distribution
    assert splits.validation is not None
    assert len(splits.train) + len(splits.validation) == 40
    found, labels = splits.train.take(36, seed=1)
    assert torch.equal(labels, predict(model, found))
    sums = images.sum((1, 2, 3))
    assert all((sums - value).abs().min() < 1e-2 for value in found.sum((1, 2, 3)))


def test_verdicts_are_left_out_where_they_are_not_looked_at() -> None:
    splits = from_iterable(torch.rand(8, 3, 32, 32), labeller=tiny_resnet())
    _, labels = next(splits.train.batches(8, verdicts=False))
    assert set(labels.tolist()) == {-1}


def test_labels_that_are_there_are_kept() -> None:
    model, images = tiny_resnet(), torch.rand(24, 3, 32, 32)
    labels = torch.arange(24) % 10
    for data in ((images, labels), [(images[:12], labels[:12]), (images[12:], labels[12:])]):
        splits = open_for(model, data)
        assert splits is not None
        assert splits.labelled
        _, found = splits.train.take(100, seed=0)
        assert set(found.tolist()) <= set(range(10))


def test_images_of_several_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="several sizes"):
        open_for(tiny_resnet(), [torch.rand(3, 32, 32), torch.rand(3, 30, 32)])


def test_what_lies_outside_the_range_is_refused() -> None:
    with pytest.raises(DataError, match="0, 1"):
        open_for(tiny_resnet(), torch.randn(8, 3, 32, 32))


def save_picture(path: Path, size: tuple[int, int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_a_folder_of_pictures_of_any_sizes_nested(tmp_path: Path) -> None:
    for i in range(24):
        where = tmp_path / ("a" if i % 2 else "a/b c/d") / f"{i}.png"
        save_picture(where, (20 + i, 40), i)
    save_picture(tmp_path / ".hidden" / "x.png", (8, 8), 0)
    (tmp_path / "notes.txt").write_text("no picture")
    model = tiny_resnet()
    splits = open_pictures(tmp_path, model, workers=0)
    assert splits.validation is not None
    assert len(splits.train) + len(splits.validation) == 24
    assert splits.test is None
    assert splits.input_size == (3, 32, 32)
    images, labels = splits.train.take(30, seed=0)
    assert images.shape[1:] == (3, 32, 32)
    assert torch.equal(labels, predict(model, images))


def test_a_folder_without_pictures_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pictures"):
        open_pictures(tmp_path, tiny_resnet())
    with pytest.raises(DataError, match="no such folder"):
        open_pictures(tmp_path / "none", tiny_resnet())


def test_an_image_folder_without_a_test_split(tmp_path: Path) -> None:
    for i in range(24):
        save_picture(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", (32, 32), i)
    splits = open_data(tmp_path, workers=0)
    assert splits.test is None
    assert splits.labelled
    assert splits.classes == 2
    assert any("nothing is measured" in note for note in splits.notes)
