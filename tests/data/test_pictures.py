"""Pictures and labels as people have them: read right, or refused in one line with the path."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robust_prune.data import as_split, check_class_order, open_data, open_pictures
from robust_prune.errors import DataError

Folder = Path


def image_folder(path: Path, classes: dict[str, int], size: int = 16) -> Path:
    """Two grey pictures in each split of each class; every class its own grey."""
    for split in ("train", "test"):
        for name, level in classes.items():
            (path / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (size, size), (level,) * 3).save(path / split / name / f"{i}.png")
    return path


def labels_by_level(path: Path, **more: bool) -> dict[int, int]:
    images, labels = open_data(path, **more).test.take(100, 0)
    levels = [round(float(image.mean()) * 255) for image in images]
    return dict(zip(levels, labels.tolist(), strict=True))


def test_numbered_class_folders_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    path = image_folder(tmp_path, {str(k): 20 * k for k in range(12)})
    assert labels_by_level(path) == {20 * k: k for k in range(12)}
    assert not [note for note in open_data(path).notes if "order" in note]


def test_numbers_inside_names_are_told_of_where_the_order_is_another(tmp_path: Path) -> None:
    path = image_folder(tmp_path / "a", {f"class{k}": 20 * k for k in range(12)})
    assert labels_by_level(path)[40] == 4  # class0, class1, class10, class11, class2
    (note,) = (n for n in open_data(path).notes if "order" in n)
    assert "class0, class1, class10" in note
    assert "class0, class1, class2" in note
    path = image_folder(tmp_path / "b", {"cat": 10, "dog": 20})
    assert not [n for n in open_data(path).notes if "order" in n]


def test_the_order_of_classes_is_stored_and_compared(tmp_path: Path) -> None:
    first = open_data(image_folder(tmp_path / "a", {"cat": 10, "dog": 20}))
    other = open_data(image_folder(tmp_path / "b", {"ant": 5, "cat": 10}))
    assert first.source["class_names"] == ["cat", "dog"]
    assert check_class_order(first, first.source) is first
    with pytest.raises(DataError, match="label 0 is class 'ant' here, but 'cat' in the data"):
        check_class_order(other, first.source)
    more = {"class_names": ["cat", "dog", "eel"]}
    with pytest.raises(DataError, match="label 2 is class 'none' here, but 'eel'"):
        check_class_order(first, more)
    assert "0 cat, 1 dog" in check_class_order(first, {}).notes[-1]


def bomb(side: int) -> bytes:
    """A PNG whose header promises `side` x `side` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def saved(image: Image.Image, path: Path, **more: object) -> bytes:
    image.save(path, **more)
    return path.read_bytes()


KINDS = ["bomb", "large", "cut", "damaged", "text", "empty", "header"]


def broken(kind: str, folder: Path) -> bytes:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    whole = saved(noise, folder / "x.png")
    contents = {
        "bomb": bomb(60_000),
        "large": bomb(11_000),
        "cut": whole[: len(whole) // 2],
        "damaged": whole[:60] + bytes(200) + whole[260:],
        "text": b"hello",
        "empty": b"",
        "header": b"\x89PNG\r\n\x1a\n",
    }
    return contents[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_that_can_not_be_read_is_one_line_with_its_path(
    tmp_path: Path, kind: str
) -> None:
    path = image_folder(tmp_path, {"a": 10, "b": 20})
    file = path / "test" / "a" / "0.png"
    file.write_bytes(broken(kind, tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"0\.png: ") as caught:
            open_data(path).test.take(4, 0)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_colours_are_what_a_viewer_shows(tmp_path: Path) -> None:
    path = image_folder(tmp_path, {"a": 10, "b": 20}, size=8)
    place = path / "test" / "a"
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 8, 4))
    turned = Image.new("RGB", (8, 8), (0, 0, 0))
    turned.paste((255, 255, 255), (0, 0, 8, 4))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pictures = {
        "alpha.png": (half, {}),
        "cmyk.jpg": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {"quality": 100}),
        "palette.png": (Image.new("RGB", (8, 8), (0, 128, 0)).quantize(4), {}),
        "turned.png": (turned, {"exif": exif}),
    }
    for file in place.iterdir():
        file.unlink()
    for name, (image, more) in pictures.items():
        image.save(place / name, **more)
    images = open_data(path).test.dataset
    alpha, cmyk, palette, upright = (images[i][0].float() for i in range(4))
    assert alpha[:, 0, 0].tolist() == [0, 0, 255]
    assert alpha[:, 7, 0].tolist() == [255, 255, 255]
    assert (cmyk - torch.tensor([255, 0, 0.0]).view(3, 1, 1)).abs().max() < 5
    assert palette[:, 0, 0].tolist() == [0, 128, 0]
    assert float(upright[:, 0].mean()) < 5 < 250 < float(upright[:, 7].mean())


@pytest.mark.parametrize(
    "labels",
    [
        np.array([2, 0, 1]),
        np.array([[2], [0], [1]]),
        np.eye(3, dtype=np.float32)[[2, 0, 1]],
        torch.eye(3, dtype=torch.long)[[2, 0, 1]],
        torch.tensor([2, 0, 1], dtype=torch.uint8),
    ],
)
def test_numpy_pairs_columns_and_one_hot_rows_are_labels(labels: object) -> None:
    images = np.random.default_rng(0).random((3, 3, 8, 8), dtype=np.float32)
    found = as_split((images, labels))
    assert [int(found.dataset[i][1]) for i in range(3)] == [2, 0, 1]


def test_soft_labels_are_refused() -> None:
    with pytest.raises(DataError, match="labels must be 3 integers"):
        as_split((np.zeros((3, 3, 8, 8), np.float32), np.full((3, 4), 0.25, np.float32)))


def test_unreadable_pictures_are_left_out_and_counted_where_that_is_asked(tmp_path: Path) -> None:
    path = image_folder(tmp_path, {"a": 10, "b": 20}, size=8)
    for i, kind in enumerate(KINDS):
        (path / "train" / "a" / f"bad{i}.png").write_bytes(broken(kind, tmp_path))
    (path / "test" / "b" / "0.png").write_bytes(b"")
    splits = open_data(path, skip_unreadable=True)
    assert [len(splits.train), len(splits.test)] == [4, 3]
    assert labels_by_level(path, skip_unreadable=True) == {10: 0, 20: 1}
    assert splits.source["left_out"] == {"train": 7, "test": 1}
    (training,) = (n for n in splits.notes if "training pictures" in n)
    assert training.startswith("7 of 11 training pictures can't be read and were left out: ")
    assert training.endswith("and 4 more")
    assert str(path / "train" / "a" / "bad0.png") in training
    (testing,) = (n for n in splits.notes if "test pictures" in n)
    assert testing.startswith("1 of 4 test pictures can't be read")
    with pytest.raises(DataError, match=r"bad0\.png: "):
        open_data(path)
    whole = open_data(image_folder(tmp_path / "whole", {"a": 1, "b": 2}), skip_unreadable=True)
    assert whole.source["left_out"] == {"train": 0, "test": 0}
    assert not [note for note in whole.notes if "left out" in note]


def test_a_class_without_a_readable_picture_is_an_error_all_the_same(tmp_path: Path) -> None:
    path = image_folder(tmp_path, {"a": 10, "b": 20})
    for file in (path / "train" / "b").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match="no picture of its class can be read"):
        open_data(path, skip_unreadable=True)


def test_pictures_without_labels_are_left_out_too(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    splits = open_pictures(tmp_path, net, input_size=(3, 8, 8), skip_unreadable=True)
    assert len(splits.train) == 3
    assert splits.source["left_out"] == {"train": 1, "test": 0}
