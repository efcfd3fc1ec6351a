"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from robust_prune.errors import ModelError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path` to write to, and move it there if nothing failed."""
    if not path.parent.is_dir():
        raise ModelError(f"{path.parent}: no such folder to write {path.name} into")
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise ModelError(f"{path.parent}: can't write there: {error.strerror}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise ModelError(f"{path}: can't be written: {why}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Write a text file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_tensors(value: Any, path: Path) -> None:
    """Write tensors as torch does; raises OSError, not torch's own error, where it can't."""
    try:
        torch.save(value, path)
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[0]) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
