"""Which channels go together, what they cost, and cutting them."""

from robust_prune.graph.applying import mask_, prune_
from robust_prune.graph.blocks import Block, branch_sum
from robust_prune.graph.costs import count_cost, weight_of
from robust_prune.graph.dependency import DependencyGraph, Importance
from robust_prune.graph.graph import ModelGraph
from robust_prune.graph.items import Group, Groups
from robust_prune.graph.probing import is_large
from robust_prune.graph.pruners import dependency_graph
from robust_prune.graph.shapes import numbers_at
from robust_prune.graph.tracing import Atoms, Slot, adapter, compress
from robust_prune.graph.verify import check_pruned, masking_error
from robust_prune.graph.wiring import MIN_WIDTH

__all__ = [
    "Atoms",
    "Block",
    "DependencyGraph",
    "Group",
    "Groups",
    "Importance",
    "MIN_WIDTH",
    "ModelGraph",
    "Slot",
    "adapter",
    "branch_sum",
    "check_pruned",
    "compress",
    "count_cost",
    "dependency_graph",
    "is_large",
    "mask_",
    "masking_error",
    "numbers_at",
    "prune_",
    "weight_of",
]
