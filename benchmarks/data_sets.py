"""Data sets by their names, as folders below one or as torchvision reads them."""

from __future__ import annotations

from pathlib import Path

from robust_prune.data import DataSplits, open_data
from robust_prune.errors import DataError
from robust_prune.types import DATA_NAMES


def open_named(name: str, root: Path | None, size: tuple[int, int, int] | None) -> DataSplits:
    """Open the folder of a name below `root`, or by its name.

    Raises:
        RobustPruneError: there is no such data.
    """
    folder = root / name if root else None
    if folder is not None and folder.is_dir():
        return open_data(folder, input_size=size)
    if name not in DATA_NAMES:
        raise DataError(
            f"{name}: no such folder below {root}; put one there, in the layout of the "
            "original or as train/<class>/ and test/<class>/"
        )
    return open_data(name, input_size=size, data_root=root)
