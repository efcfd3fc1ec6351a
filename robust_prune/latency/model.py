"""What a model takes as a function of its widths."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from robust_prune.types import ChannelGroup


@dataclass(frozen=True)
class Conditions:
    """What a time is measured with: batch, threads (0 on a GPU), number format, device."""

    batch: int
    threads: int
    precision: str
    device: str

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        return f"batch {self.batch}{threads}, {self.precision}, {self.device}"


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer as an image meets it.

    `sizes` are (outputs, inputs) of the dense layer, `shares` (side, group, channels per unit):
    what a unit of a group takes away; side 0 is the outputs. `inputs` is the shape that it reads,
    with the batch.
    """

    name: str
    sizes: tuple[int, int]
    shares: tuple[tuple[int, str, int], ...]
    inputs: tuple[int, ...]
    settings: tuple[Any, ...]
    calls: int = 1

    def at(self, dropped: Mapping[str, int]) -> tuple[int, int]:
        """Return (outputs, inputs) when groups lose this many units."""
        outputs, inputs = self._left(dropped)
        return max(outputs, 1), max(inputs, 1)

    def goes(self, dropped: Mapping[str, int]) -> bool:
        """Return whether nothing is left to compute when groups lose this many units."""
        return min(self._left(dropped)) <= 0

    def _left(self, dropped: Mapping[str, int]) -> list[int]:
        sizes = list(self.sizes)
        for side, group, channels in self.shares:
            sizes[side] -= channels * dropped.get(group, 0)
        return sizes


@dataclass(frozen=True)
class Table:
    """Milliseconds of a layer over (outputs, inputs), bilinear between what was timed."""

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]

    def at(self, outputs: int, inputs: int) -> float:
        """Return the milliseconds at these sizes."""
        i, x = _place(self.outputs, outputs)
        j, y = _place(self.inputs, inputs)
        low = self.ms[i][j] * (1 - y) + self._next(i, j + 1) * y
        high = self._next(i + 1, j) * (1 - y) + self._next(i + 1, j + 1) * y
        return low * (1 - x) + high * x

    def _next(self, i: int, j: int) -> float:
        return self.ms[min(i, len(self.outputs) - 1)][min(j, len(self.inputs) - 1)]


@dataclass(frozen=True)
class BlockTime:
    """What a residual block takes beyond its skip, which may go as a whole.

    `groups` are those that then keep nothing, `layers` the convolutions and linear layers in it.
    """

    name: str
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    ms: float


@dataclass(frozen=True)
class LatencyModel:
    """What a model takes as a function of its widths, in milliseconds.

    The times of its convolutions and linear layers, and what the whole model takes beyond them:
    norms, activations, products between activations. That is taken to fall as the outputs of the
    layers do. Of `blocks` it is known how much is theirs: all of it goes with them.
    """

    conditions: Conditions
    dense_ms: float
    layers: tuple[tuple[Layer, Table], ...]
    groups: tuple[ChannelGroup, ...]
    blocks: tuple[BlockTime, ...] = ()

    def ms(self, widths: Mapping[str, int]) -> float:
        """Return the milliseconds when groups have these widths; missing ones stay whole."""
        dropped, empty = self._dropped(widths), self._empty(widths)
        layers, written = 0.0, dict.fromkeys(self._rests, 0.0)
        for layer, table in self.layers:
            place = self._place.get(layer.name, "")
            if place in empty or layer.goes(dropped):
                continue
            outputs, inputs = layer.at(dropped)
            layers += layer.calls * table.at(outputs, inputs)
            written[place] += self._positions[layer.name] * outputs
        rests = (rest * written[p] / self._written[p] for p, rest in self._rests.items())
        return layers + sum(rests)

    def layers_at(self, widths: Mapping[str, int]) -> dict[str, float]:
        """Return the milliseconds of every layer when groups have these widths."""
        dropped, empty = self._dropped(widths), self._empty(widths)
        return {
            layer.name: 0.0
            if self._place.get(layer.name) in empty or layer.goes(dropped)
            else layer.calls * table.at(*layer.at(dropped))
            for layer, table in self.layers
        }

    @cached_property
    def layer_ms(self) -> dict[str, float]:
        """Milliseconds of every layer of the dense model."""
        return self.layers_at({})

    def _dropped(self, widths: Mapping[str, int]) -> dict[str, int]:
        return {
            g.name: (g.width - widths[g.name]) // g.blocks for g in self.groups if g.name in widths
        }

    def _empty(self, widths: Mapping[str, int]) -> set[str]:
        """Return the blocks whose groups all keep nothing."""
        return {b.name for b in self.blocks if not any(widths.get(g, 1) for g in b.groups)}

    @cached_property
    def _place(self) -> dict[str, str]:
        """By layer: the block that it lies in."""
        return {layer: block.name for block in self.blocks for layer in block.layers}

    @cached_property
    def _rests(self) -> dict[str, float]:
        """What is in no layer: of each block, and under "" of all that lies outside of them."""
        rest = max(self.dense_ms - sum(self.layer_ms.values()), 0.0)
        inside = {
            block.name: max(
                block.ms - sum(self.layer_ms.get(layer, 0.0) for layer in block.layers), 0.0
            )
            for block in self.blocks
        }
        share = min(1.0, rest / (sum(inside.values()) or 1.0))  # parts may take more than the whole
        found = {name: ms * share for name, ms in inside.items()}
        return {**found, "": max(rest - sum(found.values()), 0.0)}

    @cached_property
    def _positions(self) -> dict[str, float]:
        """By layer: for how many positions it writes its outputs."""
        return {layer.name: layer.calls * _positions(layer) for layer, _ in self.layers}

    @cached_property
    def _written(self) -> dict[str, float]:
        """By block, and under "" outside of them: outputs that the layers write."""
        found = dict.fromkeys(self._rests, 0.0)
        for layer, _ in self.layers:
            found[self._place.get(layer.name, "")] += self._positions[layer.name] * layer.sizes[0]
        return {place: written or 1.0 for place, written in found.items()}


def _place(known: Sequence[int], value: int) -> tuple[int, float]:
    """Return the interval that a value lies in, and where in it, in [0, 1]."""
    i = min(max(bisect.bisect_right(known, value) - 1, 0), max(len(known) - 2, 0))
    if len(known) == 1:
        return 0, 0.0
    return i, min(max((value - known[i]) / (known[i + 1] - known[i]), 0.0), 1.0)


def _positions(layer: Layer) -> float:
    """Return how many positions of all images a layer writes an output at."""
    if layer.settings[0] == "linear":
        return math.prod(layer.inputs[:-1])
    strides = layer.settings[3]
    return float(math.prod(layer.inputs[2:]) * layer.inputs[0] / math.prod(strides))
