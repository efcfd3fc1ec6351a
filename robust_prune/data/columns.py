"""Data sets of Hugging Face's `datasets`, read as items of (PIL image, label)."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from robust_prune.data.datasets import BROKEN, NO_LABEL, Parts
from robust_prune.errors import DataError, first_line

IMAGES = ("image", "img", "pixel", "pixels", "pixel_values")
LABELS = ("label", "labels", "fine_label")
TESTING = ("test", "validation", "val", "valid")


def is_hugging_face(data: Any) -> bool:
    """Return whether this is a Dataset or DatasetDict; imports nothing to find out."""
    module = sys.modules.get("datasets")
    kinds = tuple(getattr(module, name, None) for name in ("Dataset", "DatasetDict"))
    return any(isinstance(kind, type) and isinstance(data, kind) for kind in kinds)


def read_columns(data: Any) -> Parts:
    """Read a Dataset, or a DatasetDict with `train` and, to measure on, `test` or `validation`.

    Raises:
        DataError: no `train`, or no column, or several, that could be images or labels.
    """
    if not isinstance(data, Mapping):
        train, testing = Rows(data), None
    elif "train" in data:
        train = Rows(data["train"])
        others = (name for name in TESTING if name in data and len(data[name]))
        testing = next((name for name in others if Rows(data[name])[0][1] != NO_LABEL), None)
    else:
        there = ", ".join(map(str, data)) or "none"
        raise DataError(f"the data set has no split 'train'; its splits are {there}")
    names = train.class_names
    test = () if testing is None else Rows(data[testing])
    if testing is not None and names != test.class_names:  # type: ignore[union-attr]
        raise DataError(f"the classes of 'train' and of {testing!r} have other names")
    note = f"test images come from {testing}" if testing else "no test images in the data set"
    return Parts(train, test, classes=len(names) or train.classes, notes=(note,), class_names=names)


class Rows:
    """One split as items of (PIL image, label)."""

    def __init__(self, rows: Any) -> None:
        if not len(rows):
            raise DataError("a split of the data set holds no images")
        self.image = _column(rows, IMAGES, "images")
        self.label = _column(rows, LABELS, "labels")
        self.rows = rows.with_format(None)  # as Python values, not as another library's tensors
        self.class_names = tuple(getattr(rows.features[self.label], "names", None) or ())

    @property
    def classes(self) -> int:
        """How many classes there are, by the largest label."""
        return int(max(self.rows[self.label])) + 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            row = self.rows[int(index)]
            picture, label = row[self.image], row[self.label]
            if isinstance(picture, Mapping):
                raw = picture.get("bytes")
                picture = Image.open(io.BytesIO(raw) if raw else picture["path"])
            if not isinstance(picture, Image.Image):
                raise DataError(
                    f"column {self.image!r} holds {type(picture).__name__}, not pictures; cast it: "
                    f"data.cast_column({self.image!r}, datasets.Image())"
                )
            grey = picture.mode in ("1", "L", "LA")
            return picture.convert("L" if grey else "RGB"), int(label)
        except BROKEN as error:
            raise DataError(f"row {index} of the data set: {first_line(error)}") from None


def _column(rows: Any, names: Sequence[str], what: str) -> str:
    """Return the one column that holds this; of CIFAR-100's two kinds of labels the fine ones."""
    found = [name for name in rows.column_names if name in names]
    if len(found) == 1:
        return str(found[0])
    there = ", ".join(map(str, rows.column_names)) or "none"
    problem = f"no column of {what}" if not found else f"{len(found)} columns of {what}"
    raise DataError(
        f"the data set has {problem}: its columns are {there}; rename one to {names[0]!r}, and "
        "remove others like it"
    )
