"""The normalisation that a file has: beside its weights, or in the settings stored with them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from robust_prune.errors import ModelError
from robust_prune.models.builders import per_channel
from robust_prune.models.content import Content, numbers_of

MEAN = re.compile(r"(^|[_\W])(means?|mu)(?=_|$)", re.IGNORECASE)
STD = re.compile(r"(^|(?<!inv)[_\W])(stds?|stdev|sigma)(?=_|$)", re.IGNORECASE)
BYTE_SCALE = 5.0  # a mean or std above it is of images in 0..255
UNIFORM = 0.03  # a std below it is of no images: of accuracies, of initial weights
LARGEST_IMAGE = 2**14


@dataclass(frozen=True)
class Normalisation:
    """Mean and std per channel for images in [0, 1], where they stood, and what was used up."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    names: tuple[str, ...] = ()
    scaled: bool = False

    @property
    def note(self) -> str:
        """What a user is told of it."""
        how = ", divided by 255" if self.scaled else ""
        return f"normalisation from the file ({self.source}{how}): mean {self.mean}, std {self.std}"


def from_tensors(left: Mapping[str, Tensor], root: str, channels: int) -> Normalisation | None:
    """Find mean and std among tensors that no network uses, the pair nearest to the weights.

    Args:
        left: tensors by name.
        root: where the network's weights are.
        channels: of the images.
    """
    found: list[tuple[int, Normalisation]] = []
    every: list[str] = []
    for name, tensor in left.items():
        if not _matches(MEAN, name) or tensor.numel() not in (1, channels):
            continue
        beside = name.rpartition(".")[0]
        partner = next(
            (
                other
                for other, second in left.items()
                if other.rpartition(".")[0] == beside
                and _matches(STD, other)
                and _stem(STD, other) == _stem(MEAN, name)
                and second.numel() in (1, channels)
            ),
            None,
        )
        if partner is None:
            continue
        pair = _pair(numbers_of(tensor), numbers_of(left[partner]), channels)
        every += [name, partner]
        if pair is not None:
            shared = len(_common(name, f"{root}."))
            found.append((-shared, Normalisation(*pair[:2], f"{name}, {partner}", (), pair[2])))
    if not found:
        return None
    best = min(found, key=lambda item: item[0])[1]
    return Normalisation(best.mean, best.std, best.source, tuple(every), best.scaled)


def from_settings(content: Content, channels: int) -> Normalisation | None:
    """Find mean and std in a mapping of settings (timm's args, a config), the outermost first."""
    for path, settings in sorted(content.settings.items(), key=lambda item: item[0].count(".")):
        if settings.get("do_normalize") is False:  # of transformers' image processors
            continue
        # tensors are buffers of a network, found by their names
        plain = {key: value for key, value in settings.items() if not isinstance(value, Tensor)}
        means, stds = ([k for k in plain if _matches(p, k)] for p in (MEAN, STD))
        for mean, std in itertools.product(means, stds):
            pair = _pair(numbers_of(plain[mean]), numbers_of(plain[std]), channels)
            if pair is None or min(pair[1]) < UNIFORM:
                continue
            if _stem(MEAN, mean) == _stem(STD, std):
                where = f"{path}.{mean}" if path else mean
                return Normalisation(*pair[:2], where, (), pair[2])
    return None


def stored_normalisation(
    path: Path, config: Mapping[str, Any], channels: int
) -> Normalisation | None:
    """Return the normalisation of a configuration as timm writes it, one value a channel.

    Raises:
        ModelError: there is one, and it is not made of numbers.
    """
    if not config.get("mean") and not config.get("std"):
        return None
    mean, std = numbers_of(config.get("mean")), numbers_of(config.get("std"))
    if not mean or not std or _pair(mean, std, len(mean)) is None:
        raise ModelError(f"{path}: 'mean' and 'std' must be numbers per channel, std positive")
    return Normalisation(per_channel(mean, channels), per_channel(std, channels), "config.json")


def size_from_settings(content: Content, channels: int) -> tuple[int, int, int] | None:
    """Find the size of images, (channels, height, width), in settings as timm keeps them."""
    for _, settings in sorted(content.settings.items(), key=lambda item: item[0].count(".")):
        for key in ("input_size", "img_size", "image_size"):
            size = image_size(settings.get(key), channels)
            if size is not None:
                return size
    return None


def image_size(value: object, channels: int) -> tuple[int, int, int] | None:
    """Return (channels, height, width) from one, two or three numbers, None where they are none."""
    numbers = numbers_of([value] if isinstance(value, (int, float)) else value)
    if isinstance(value, bool) or numbers is None or len(numbers) not in (1, 2, 3):
        return None
    if not all(1 <= n <= LARGEST_IMAGE and n == int(n) for n in numbers):
        return None
    if len(numbers) == 3 and numbers[0] != channels:
        return None
    height, width = numbers[-2:] if len(numbers) > 1 else numbers * 2
    return channels, int(height), int(width)


def _pair(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...], bool] | None:
    """Return (mean, std, whether divided by 255), one value a channel, where they are usable."""
    if not mean or not std or {len(mean), len(std)} - {1, channels}:
        return None
    if not all(map(math.isfinite, (*mean, *std))) or any(s <= 0 for s in std):
        return None
    scaled = max(map(abs, (*mean, *std))) > BYTE_SCALE
    means, stds = (
        tuple(float(f"{v / 255:.7g}") if scaled else v for v in values) * (channels // len(values))
        for values in (mean, std)
    )
    return means, stds, scaled


def _matches(pattern: re.Pattern[str], name: str) -> bool:
    return bool(pattern.search(name.rpartition(".")[2]))


def _stem(pattern: re.Pattern[str], name: str) -> str:
    """Return what is left of a name's last part without its mean or std."""
    return pattern.sub("", name.rpartition(".")[2])


def _common(one: str, two: str) -> str:
    length = next(
        (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b),
        min(len(one), len(two)),
    )
    return one[:length]
