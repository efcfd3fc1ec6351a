"""Arrays as users have them, as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust_prune.errors import DataError, first_line


def tensor_of(values: Any, what: str) -> Tensor:
    """Return numbers as a dense tensor without gradient, of any byte order, strides and layout.

    Args:
        values: a tensor, an array, or nested lists.
        what: how a message calls them.

    Raises:
        DataError: they are no numbers, or not all of one length.
    """
    if isinstance(values, Tensor):
        found = values.detach()
        return found if found.layout is torch.strided else found.to_dense()
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{what} can't be put into one array: {first_line(error)}") from None
    if array.dtype.kind not in "biuf":
        raise DataError(f"{what} must be numbers, not of numpy's type {array.dtype}")
    wide = array.dtype.itemsize > 8  # numpy's longdouble, which torch has not
    kind = np.dtype(np.float64) if wide else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(array, kind, ["C", "W"]))
