"""A plan applied to a model: channels removed, or silenced."""

from __future__ import annotations

from torch import nn

from robust_prune.graph.graph import ModelGraph
from robust_prune.types import PruningPlan


def prune_(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Remove the channels that `plan` drops from `model`, in place, and return it.

    Build optimizers afterwards: the parameters are new objects.

    Raises:
        PlanError: the plan was made for another network; the model is then untouched.
    """
    _graph_of(model, plan).apply_(plan)
    return model


def mask_(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Silence in place the channels that `plan` drops: same outputs as pruning, full size."""
    _graph_of(model, plan).mask_(plan)
    return model


def _graph_of(model: nn.Module, plan: PruningPlan) -> ModelGraph:
    return ModelGraph(
        model, plan.input_size, probe=False, ties=plan.ties, whole_heads=plan.whole_heads
    )
