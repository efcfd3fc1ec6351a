"""From the command line's text to values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from robust_prune.errors import UsageError
from robust_prune.untrusted import parse_json

Size = tuple[int, int, int]
AUTO = 0  # of a multiple: what the device is fast at; of test images: what a margin takes


def numbers(text: str) -> tuple[float, ...]:
    """Read `0.49,0.48,0.45`."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{text!r}: give numbers separated by commas, as 0.49,0.48,0.45") from None


def batch_sizes(text: str) -> tuple[int, ...]:
    """Read `1,16,64`, or 0 for none."""
    parts = [part.strip() for part in text.split(",")]
    if parts == ["0"]:
        return ()
    if any(not part.isdigit() or int(part) < 1 for part in parts):
        raise UsageError(f"batches {text!r}: give numbers from 1 on, as 1,16,64, or 0 for none")
    return tuple(dict.fromkeys(int(part) for part in parts))


def number_or_auto(called: str) -> Callable[[str], int]:
    """Return what reads a number from 1 on, or `auto`, for an option that messages call so."""

    def read(text: str) -> int:
        if text == "auto":
            return AUTO
        if not text.isdigit() or int(text) < 1:
            raise UsageError(f"{called} {text!r} must be a number from 1 on, or auto")
        return int(text)

    return read


def image_size(text: str) -> Size:
    """Read `3,32,32`."""
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or any(not p.strip().isdigit() or int(p) < 1 for p in parts):
        raise UsageError(f"input size {text!r}: give channels,height,width, as 3,32,32")
    return int(parts[0]), int(parts[1]), int(parts[2])


def builder_kwargs(text: str) -> dict[str, Any]:
    """Read the arguments of a builder, a JSON object."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UsageError(
            f"--model-kwargs is not JSON ({error}); quote it as '{{\"channels\": [16, 32]}}'"
        ) from None
    if not isinstance(value, dict):
        raise UsageError(f"--model-kwargs must be a JSON object, not {type(value).__name__}")
    return value


def shares(entries: Sequence[str], option: str) -> dict[str, float]:
    """Read `NAME=SHARE` entries, shares in [0, 1).

    Raises:
        UsageError: one is something else, or a name is there twice with different shares.
    """
    found: dict[str, float] = {}
    for entry in entries:
        name, sign, text = entry.rpartition("=")
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not name or not sign or not 0 <= share < 1:
            raise UsageError(f"{option} {entry!r} must be NAME=SHARE, with a share in [0, 1)")
        if found.setdefault(name, share) != share:
            raise UsageError(f"{option} names {name!r} twice, with different shares")
    return found
