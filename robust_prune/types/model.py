"""What is known of a model: how it is built, what it costs, which channels go together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from robust_prune.types.budget import Target
from robust_prune.types.plain import three_integers

DATA_NAMES = ("digits", "cifar10", "cifar100", "svhn")  # data sets that need no folder
PUBLIC_DATA = re.compile(r"(torch|hfds)/[^/].*")  # timm's names, that say nothing of folders


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one image, parameters, and prunable channels of a model, where known."""

    macs: int
    params: int
    channels: int | None

    def of(self, target: Target) -> int:
        """Return the count that a budget on `target` is about."""
        return int(getattr(self, target))


@dataclass(frozen=True)
class ChannelGroup:
    """Layers whose channels can only be removed together.

    `width` counts the channels of `name`, the layer that stands for the group. A unit is the least
    that can be removed at once: one channel, or one of every block of a grouped convolution or
    head of an attention (`blocks` channels). Channel i belongs to unit i % units, or `units_of[i]`
    where given. `members` are the layers that lose output channels, `readers` input channels.
    """

    name: str
    width: int
    blocks: int
    min_width: int
    members: tuple[str, ...]
    readers: tuple[str, ...]
    units_of: tuple[int, ...] = ()

    def unit(self, channel: int) -> int:
        """Return the unit that a channel belongs to."""
        return self.units_of[channel] if self.units_of else channel % self.units

    @property
    def units(self) -> int:
        """How many units the group has."""
        return self.width // self.blocks

    @property
    def min_units(self) -> int:
        """How many units must stay."""
        return max(1, math.ceil(self.min_width / self.blocks))


@dataclass(frozen=True)
class ModelSpec:
    """Everything but the weights that is needed to build a model again.

    `source` is `timm`, `torchvision` or `custom` (a class of the user's, which only the user can
    build). `input_size` is (channels, height, width); `mean` and `std` are per channel, for images
    in [0, 1].
    """

    source: Literal["timm", "torchvision", "custom"]
    arch: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    cifar_stem: bool = False
    num_classes: int = 0
    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Build a spec from parsed JSON."""
        size = data.get("input_size")
        return cls(
            source=data["source"],
            arch=data["arch"],
            kwargs=dict(data.get("kwargs", {})),
            cifar_stem=bool(data.get("cifar_stem", False)),
            num_classes=int(data.get("num_classes", 0)),
            input_size=three_integers(size) if size else None,
            mean=tuple(data.get("mean", ())),
            std=tuple(data.get("std", ())),
        )


@dataclass(frozen=True)
class Unprunable:
    """A layer or group that stays as it is, and why."""

    name: str
    reason: str
