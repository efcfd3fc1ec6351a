"""Data by timm's names, and data sets of Hugging Face."""

from __future__ import annotations

import io
import json
import struct
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robust_prune.data import DataSplits, open_data, open_for
from robust_prune.errors import DataError
from tests.data.test_pictures import image_folder


def mnist(root: Path, n: int = 20) -> Path:
    """Files as MNIST has them: picture i is as bright as i."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = np.repeat(np.arange(n, dtype=np.uint8), 28 * 28).tobytes()
        labels = bytes(i % 10 for i in range(n))
        images = struct.pack(">IIII", 2051, n, 28, 28) + pixels
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels)
    return root


def test_torchvisions_data_by_timms_names(tmp_path: Path) -> None:
    splits = open_data("torch/mnist", data_root=mnist(tmp_path))
    assert (splits.name, splits.classes, splits.input_size) == ("mnist", 10, (1, 28, 28))
    assert splits.source["data"] == "torch/mnist"
    assert splits.source["data_root"] == str(tmp_path)
    images, labels = splits.test.take(20, 0)
    levels = (images.mean((1, 2, 3)) * 255).round().long()
    assert torch.equal(levels % 10, labels)


def test_a_folder_by_torchvisions_reader_has_class_names(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"cat": 10, "dog": 20})
    (root / "test").rename(root / "validation")
    splits = open_data("torch/image_folder", data_root=root)
    assert splits.source["class_names"] == ["cat", "dog"]
    assert len(splits.test) == 4


@pytest.mark.parametrize("name", ["torch/mnist", "torch/nothing"])
def test_what_is_not_there_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{name} can't be read .*; add --download") as caught:
        open_data(name, data_root=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "library"), [("hfds/a/b", "datasets"), ("wds/shards", "webdataset")]
)
def test_a_missing_library_is_named(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DataError, match=f"{name} needs {library}: python -m pip install {library}"):
        open_data(name)


class Dataset:
    """What is asked of a Dataset of Hugging Face."""

    def __init__(self, columns: dict[str, list[Any]], names: list[str] | None = None) -> None:
        self.columns, self.column_names = columns, list(columns)
        kind = type("ClassLabel", (), {"names": names})
        self.features = dict.fromkeys(columns, kind())

    def with_format(self, kind: None) -> Dataset:
        return self

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, str):
            return self.columns[which]
        return {name: column[which] for name, column in self.columns.items()}


class DatasetDict(dict[str, Dataset]):
    """Splits by name."""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", sys.modules[__name__])


PICTURES = [Image.new("RGB", (8, 8), (10 * i,) * 3) for i in range(6)]
LABELS = [0, 1, 0, 1, 0, 1]
NET = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))


def by_level(splits: DataSplits) -> dict[int, int]:
    """The label of each picture, by its grey."""
    images, labels = splits.test.take(6, 0)
    levels = (images[:, 0, 0, 0] * 255).round().int().tolist()
    return dict(zip(levels, labels.tolist(), strict=True))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    "columns", [("image", "label"), ("img", "fine_label"), ("pixel", "labels")]
)
def test_columns_are_found_by_their_names(columns: tuple[str, str]) -> None:
    image, label = columns
    rows = Dataset({image: PICTURES, label: LABELS, "coarse_label": LABELS}, ["cat", "dog"])
    splits = open_for(NET, DatasetDict(train=rows, test=rows), input_size=(3, 8, 8))
    assert splits is not None
    assert splits.source["class_names"] == ["cat", "dog"]
    assert by_level(splits) == {10 * i: i % 2 for i in range(6)}
    assert open_for(NET, rows, input_size=(3, 8, 8)).test is None


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": LABELS, "label": LABELS}, "no column of images: its columns are text, label"),
        ({"image": PICTURES}, "no column of labels: its columns are image"),
        ({"image": PICTURES, "img": PICTURES, "label": LABELS}, "2 columns of images"),
        ({"image": PICTURES, "label": LABELS, "labels": LABELS}, "2 columns of labels"),
        ({"image": LABELS, "label": LABELS}, "column 'image' holds int, not pictures"),
    ],
)
def test_columns_that_can_not_be_told_are_one_line(columns: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_for(NET, Dataset(columns), input_size=(3, 8, 8))
    assert "\n" not in str(caught.value)


def test_the_real_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = datasets.Dataset.from_dict({"image": PICTURES, "label": LABELS}, features=kinds)
    for name in ("train", "test"):
        rows.to_parquet(tmp_path / "set" / f"{name}.parquet")
    given = datasets.DatasetDict(train=rows, test=rows)
    by_name = open_data(f"hfds/{tmp_path / 'set'}", input_size=(3, 8, 8))
    for splits in (open_for(NET, given, input_size=(3, 8, 8)), by_name):
        assert splits.source["class_names"] == ["cat", "dog"]
        assert by_level(splits) == {10 * i: i % 2 for i in range(6)}


def test_shards_of_webdataset(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    info: dict[str, Any] = {"splits": {}}
    for split in ("train", "validation"):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as archive:
            for i, picture in enumerate(PICTURES):
                raw = io.BytesIO()
                picture.save(raw, "PNG")
                for suffix, data in (("png", raw.getvalue()), ("cls", str(i % 2).encode())):
                    member = tarfile.TarInfo(f"{i:04}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        about = {"filenames": [f"{split}-0.tar"], "shard_lengths": [6], "num_samples": 6}
        info["splits"][split] = {**about, "name": split}
    (tmp_path / "_info.json").write_text(json.dumps(info))
    splits = open_data(f"wds/{tmp_path}", input_size=(3, 8, 8))
    assert (len(splits.train), len(splits.test), splits.classes) == (6, 6, 2)
    assert by_level(splits) == {10 * i: i % 2 for i in range(6)}
