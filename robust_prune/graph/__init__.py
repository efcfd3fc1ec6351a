"""Which channels go together, what they cost, and cutting them."""

from robust_prune.graph.costs import count_cost, weight_of
from robust_prune.graph.graph import MIN_WIDTH, ModelGraph, mask_, prune_
from robust_prune.graph.tracing import Atoms, Slot, adapter, compress
from robust_prune.graph.verify import check_pruned, masking_error

__all__ = [
    "Atoms",
    "MIN_WIDTH",
    "ModelGraph",
    "Slot",
    "adapter",
    "check_pruned",
    "compress",
    "count_cost",
    "mask_",
    "masking_error",
    "prune_",
    "weight_of",
]
