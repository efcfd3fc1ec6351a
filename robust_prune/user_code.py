"""Code of the user's: modules of the current folder, last on the path."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def importable_folder() -> Iterator[None]:
    """Let modules of the current folder be imported, behind everything that is installed."""
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
