"""What scikit-learn brings along: digits and photographs."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def sample_digits() -> Any:
    """Return the 1,797 digits: `images` [N, 8, 8] from 0 to 16, and `target` [N]."""
    with _environment_kept():
        from sklearn.datasets import load_digits
    return load_digits()


def sample_photographs() -> list[Any]:
    """Return the photographs, each [H, W, 3] of bytes.

    They are read where scikit-learn keeps them: importing it takes seconds.
    """
    package = importlib.util.find_spec("sklearn")  # located, not imported
    if package is not None and package.origin is not None:
        folder = Path(package.origin).parent / "datasets" / "images"
        found = [_pixels(path) for path in sorted(folder.glob("*.jpg"))]
        if found:
            return found
    with _environment_kept():
        from sklearn.datasets import load_sample_images
    return [np.asarray(image) for image in load_sample_images().images]


def _pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image)


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    """Undo what an import does to the environment and to filters of warnings.

    scikit-learn sets variables of OpenMP's runtime for its own parallel loops, which nothing here
    runs, and lets its deprecations through; both are the caller's to decide.
    """
    before = dict(os.environ)
    with warnings.catch_warnings():
        yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
