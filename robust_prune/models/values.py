"""Plain values inside a pickle, read without calling what the file names.

torch's restricted unpickler refuses every name that is not on its list, and calls those that are
with whatever arguments the file has. The names added here stand for values that people keep beside
weights. None is mapped to its own class: the stand-ins below keep what they are given and do
nothing with it, so that no constructor (of an array of 10^12 entries, or of numpy's dtypes, whose
state is trusted with memory) is ever handed to a file.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

NUMBERS = re.compile(r"b1|[iu][1248]|f[248]|c8|c16")


class Kept:
    """A value that holds neither weights nor settings: a path, a date, the name of a type."""

    def __init__(self, *arguments: Any) -> None:
        """Forget what it was made of."""

    def __setstate__(self, state: Any) -> None:
        """Forget what it was filled with."""


class Listed(list[Any]):
    """A deque, as a list."""

    def __init__(self, *arguments: Any) -> None:
        """Start empty; the entries follow one by one."""
        super().__init__()


class Mapped:
    """A defaultdict or another dictionary with a class of its own, as an OrderedDict."""

    def __new__(cls, *arguments: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        """Start empty, without the factory of missing entries."""
        return OrderedDict()


class Attributes(dict[str, Any]):
    """A Namespace, as a dictionary of its attributes."""

    def __init__(self, *arguments: Any) -> None:
        """Start empty; the attributes follow."""
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Take the attributes."""
        if isinstance(state, Mapping):
            self.update({name: value for name, value in state.items() if isinstance(name, str)})


class ElementType:
    """The type of an array's entries."""

    def __init__(self, code: Any = "", *arguments: Any) -> None:
        self.code = code if isinstance(code, str) else ""
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        """Take the byte order; fields, sizes and flags are not looked at."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]

    def numbers(self) -> np.dtype[Any] | None:
        """Return numpy's type where the entries are numbers."""
        return np.dtype(self.order + self.code) if NUMBERS.fullmatch(self.code) else None


class Array:
    """An array of numbers; one of anything else stays without a value."""

    def __init__(self, *arguments: Any) -> None:
        self.value: torch.Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        """Take shape and entries: as many bytes as the shape asks for, else nothing."""
        if not isinstance(state, tuple) or len(state) != 5:
            return
        _, shape, kind, by_columns, raw = state
        numbers = kind.numbers() if isinstance(kind, ElementType) else None
        if numbers is None or not isinstance(raw, bytes) or not isinstance(shape, tuple):
            return
        if not all(type(size) is int and size >= 0 for size in shape):
            return
        count = 1
        for size in shape:
            count *= size
        if count * numbers.itemsize != len(raw):
            return
        found = np.frombuffer(raw, numbers).reshape(shape, order="F" if by_columns else "C")
        self.value = torch.from_numpy(found.astype(numbers.newbyteorder("=")))


def _reconstruct(*arguments: Any) -> Array:
    return Array()


def _scalar(kind: Any = None, raw: Any = b"", *arguments: Any) -> Any:
    """Return a numpy scalar as Python's number."""
    numbers = kind.numbers() if isinstance(kind, ElementType) else None
    if numbers is None or not isinstance(raw, bytes) or len(raw) != numbers.itemsize:
        return Kept()
    return np.frombuffer(raw, numbers)[0].item()


def _no_bytes(*arguments: Any) -> bytes:
    """Return the empty bytes, which are written as a call; longer ones are not."""
    return b""


def plain(value: Any) -> Any:
    """Return an array as a tensor, and every other value as it is."""
    return value.value if isinstance(value, Array) else value


_DICTIONARIES = (
    "addict.addict.Dict",
    "collections.defaultdict",
    "easydict.EasyDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "munch.Munch",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
)
_PATHS = ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
_TYPES = (
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str")),
    *(f"builtins.{name}" for name in ("frozenset", "range", "slice", "tuple")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *(f"numpy.{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    *(f"numpy.{name}" for name in ("bool", "bool_", "float16", "float32", "float64", "str_")),
    "decimal.Decimal",
    "fractions.Fraction",
    "uuid.UUID",
)
# what a file's names stand for, by the name
STAND_INS: tuple[tuple[Callable[..., Any], str], ...] = (
    *((Mapped, name) for name in _DICTIONARIES),
    *((Kept, name) for name in _TYPES),
    (_no_bytes, "builtins.bytes"),
    (Attributes, "argparse.Namespace"),
    (Attributes, "types.SimpleNamespace"),
    (Attributes, "cox.utils.Parameters"),
    (Listed, "collections.deque"),
    (Array, "numpy.ndarray"),
    (ElementType, "numpy.dtype"),
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
)
