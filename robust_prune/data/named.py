"""Data sets by name: those of the package, timm's, and Hugging Face's."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from robust_prune.data.columns import is_hugging_face, read_columns
from robust_prune.data.datasets import Parts, read_digits, read_torchvision
from robust_prune.data.splits import ITERABLE_BYTES
from robust_prune.errors import DataError, first_line
from robust_prune.types import DATA_NAMES

Source = dict[str, Any]
NOT_TO_FLIP = ("mnist", "svhn", "digits")
TESTING = ("validation", "val", "test")


def read_named(data: Any, root: Path, download: bool) -> tuple[str, Parts, Source] | None:
    """Return name, images and source of data that needs no folder of the user's; None for others.

    Args:
        data: `digits`, `cifar10` and so on; `torch/NAME`, `hfds/NAME` or `wds/FOLDER`, as timm
            calls them; or a Dataset or DatasetDict of Hugging Face.
        root: where downloaded data sets lie.
        download: fetch what is not there.

    Raises:
        DataError: it is not there, can't be read, or its library is missing.
    """
    if is_hugging_face(data):
        return "a Hugging Face data set", read_columns(data), {}
    name = str(data)
    prefix, _, rest = name.partition("/")
    source: Source = {"data": name}
    if name == "digits":
        return name, read_digits(), source
    if name in DATA_NAMES:
        parts = read_torchvision(name, root, download)
    elif prefix.lower() in READERS and rest and not Path(name).is_dir():
        source["data"] = f"{prefix.lower()}/{_resolved(rest)}"
        parts = READERS[prefix.lower()](rest, root, download)
        name = Path(rest).name
    else:
        return None
    return name, parts, {**source, "data_root": str(root.resolve())}


def _resolved(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def _read_torch(name: str, root: Path, download: bool) -> Parts:
    """Read a data set of torchvision by timm's name for it."""
    from timm.data import create_dataset

    def part(split: str) -> Any:
        try:
            return create_dataset(f"torch/{name}", str(root), split=split, download=download)
        except (AssertionError, RuntimeError, OSError, ValueError, TypeError) as error:
            hint = "the download failed" if download else "add --download, or name --data-root"
            raise DataError(
                f"torch/{name} can't be read under {root} ({first_line(error)}); {hint}"
            ) from None

    train, test = part("train"), part("validation")
    names = tuple(map(str, getattr(train, "classes", ())))
    return Parts(
        train,
        test,
        classes=len(names) or 1 + max(int(train[i][1]) for i in range(len(train))),
        flip=not any(word in name.lower() for word in NOT_TO_FLIP),
        class_names=names,
    )


def _read_hugging_face(name: str, root: Path, download: bool) -> Parts:
    """Read a data set of the Hub, or a folder of Parquet files or pictures as it would be there."""
    _need("datasets", f"hfds/{name}")
    import datasets

    if not download and not Path(name).exists():
        raise DataError(
            f"hfds/{name} is no folder here, and nothing is fetched from the Hub unasked; add "
            "--download, which uses what was fetched before"
        )
    try:
        return read_columns(datasets.load_dataset(name))
    except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        raise DataError(f"hfds/{name} can't be read: {first_line(error)}") from None


def _read_shards(name: str, root: Path, download: bool) -> Parts:
    """Read a folder of WebDataset shards with timm's _info.json into memory."""
    _need("webdataset", f"wds/{name}")
    from timm.data import create_dataset

    folder = Path(name) if Path(name).is_dir() else root / name
    if not folder.is_dir():
        raise DataError(f"wds/{name}: neither {name} nor {folder} is a folder of shards")

    def part(split: str) -> list[Any]:
        items, size = [], 0
        for image, label in create_dataset("wds/", str(folder), split=split):
            image = image.copy()
            items.append((image, int(label)))
            size += image.width * image.height * 3
            if size > ITERABLE_BYTES:
                raise DataError(
                    f"wds/{name}: more than {ITERABLE_BYTES >> 30} GiB of pictures, which are held "
                    "in memory; unpack the shards into an image folder"
                )
        return items

    def testing() -> list[Any]:
        for split in TESTING:
            with contextlib.suppress(RuntimeError, LookupError):  # there is no such split
                return part(split)
        return []

    try:
        train, test = part("train"), testing()
    except (OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"wds/{name}: {folder}: {first_line(error)}") from None
    if not train:
        raise DataError(f"wds/{name}: {folder}: no training pictures in it")
    return Parts(train, test, classes=1 + max(label for _, label in train))


def _need(library: str, name: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise DataError(f"{name} needs {library}: python -m pip install {library}")


READERS: dict[str, Callable[[str, Path, bool], Parts]] = {
    "torch": _read_torch,
    "hfds": _read_hugging_face,
    "wds": _read_shards,
}
