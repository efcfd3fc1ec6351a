"""Whether there is something at a path, whatever a user has typed."""

from __future__ import annotations

import os
from pathlib import Path


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether a file or folder is there; not where no file system can have such a name."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or links that go round
        return False


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is there."""
    return is_there(path) and Path(path).is_dir()
