"""One forward pass in which every entry of every tensor carries its channel's identity."""

from robust_prune.graph.tracing.adapters import adapted, adapter, find
from robust_prune.graph.tracing.atoms import Atoms, compress
from robust_prune.graph.tracing.coupling import couple
from robust_prune.graph.tracing.groups import Count, Coupling, Slot
from robust_prune.graph.tracing.products import work_of
from robust_prune.graph.tracing.tracer import HEAD_NUMBERS, name_of
from robust_prune.graph.tracing.training import train_mode

__all__ = [
    "Atoms",
    "Count",
    "Coupling",
    "HEAD_NUMBERS",
    "Slot",
    "adapted",
    "adapter",
    "compress",
    "couple",
    "find",
    "name_of",
    "train_mode",
    "work_of",
]
