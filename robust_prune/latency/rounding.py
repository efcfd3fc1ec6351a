"""Which multiple of channels a device is fast at."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robust_prune.graph import ModelGraph
from robust_prune.latency.measuring import alternating, layer_module, layers_of
from robust_prune.latency.model import Conditions, Layer
from robust_prune.modules import device_of

MULTIPLES = (32, 16, 8, 4, 2)
LAYERS = 3  # that are timed: those with the most products
PAIRS = 7
# Channels that go are free of use where they save less than this part of their share.
FREE = 0.5


@dataclass(frozen=True)
class Rounding:
    """A multiple of channels, and what was timed to find it.

    `saved` has, by multiple, the share of the layers' time that half as many channels fewer saved,
    and the share of the channels that this is.
    """

    multiple: int
    layers: tuple[str, ...]
    saved: dict[int, tuple[float, float]]


def fast_multiple(graph: ModelGraph, conditions: Conditions) -> Rounding:
    """Return the largest multiple within which removing channels saves next to no time.

    The layers with the most products are timed at a multiple of 32 outputs and at 1 to 16 fewer, by
    turns. Kernels work on blocks of channels: where half a block less costs as much as the whole,
    widths between its multiples are wasted.

    Args:
        graph: of the model; left as it was.
        conditions: batch, threads and number format.
    """
    images = torch.rand(conditions.batch, *graph.input_size, device=device_of(graph.model))
    widest = MULTIPLES[0]
    layers = [
        layer
        for layer in layers_of(graph, images)
        if layer.sizes[0] >= widest and any(side == 0 for side, _, _ in layer.shares)
    ]
    layers = sorted(layers, key=lambda layer: -_products(layer))[:LAYERS]
    if not layers:
        return Rounding(1, (), {})
    fewer = [multiple // 2 for multiple in MULTIPLES]
    ms = [0.0] * (1 + len(fewer))
    for layer in layers:
        whole = layer.sizes[0] // widest * widest
        made = [layer_module(layer, whole - n, layer.sizes[1]) for n in (0, *fewer)]
        some = torch.rand(made[0][1], device=images.device)
        modules = [module.to(images.device).eval() for module, _ in made]
        found = alternating(modules, some, conditions, PAIRS)
        ms = [so_far + layer.calls * one for so_far, one in zip(ms, found, strict=True)]
    channels = sum(layer.sizes[0] // widest * widest for layer in layers) / len(layers)
    saved = {
        multiple: (1 - less / ms[0], n / channels)
        for multiple, n, less in zip(MULTIPLES, fewer, ms[1:], strict=True)
    }
    free = (m for m, (time, share) in saved.items() if time < FREE * share)
    return Rounding(next(free, 1), tuple(layer.name for layer in layers), saved)


def _products(layer: Layer) -> float:
    positions = layer.calls * torch.Size(layer.inputs[2:]).numel()
    kernel = 1
    if layer.settings[0] == "conv":
        kernel = torch.Size(layer.settings[2]).numel()
        positions //= max(torch.Size(layer.settings[3]).numel(), 1)
    return positions * kernel * layer.sizes[0] * layer.sizes[1]
