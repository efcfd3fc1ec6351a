"""Frozen data as what JSON can hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


def to_plain(value: Any) -> Any:
    """Turn dataclasses into dictionaries that JSON can hold.

    A dataclass's method `derived`, where it has one, gives further or other entries.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        derived = getattr(value, "derived", None)
        return plain if derived is None else {**plain, **to_plain(derived())}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def three_integers(values: Any) -> tuple[int, int, int]:
    """Return the size of an image, (channels, height, width), from parsed JSON."""
    channels, height, width = (int(v) for v in values)
    return channels, height, width


def without_nan(value: Any) -> Any:
    """Return plain data with NaN and infinities as None: JSON has none."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
