"""Milliseconds on this device: measured per layer shape, summed up as a function of the widths."""

from robust_prune.latency.measuring import alternating, cache_path, conditions_of, latency_model
from robust_prune.latency.model import BlockTime, Conditions, LatencyModel, Layer, Table
from robust_prune.latency.rounding import Rounding, fast_multiple

__all__ = [
    "BlockTime",
    "Conditions",
    "LatencyModel",
    "Layer",
    "Rounding",
    "Table",
    "alternating",
    "cache_path",
    "conditions_of",
    "fast_multiple",
    "latency_model",
]
