"""Channel scores: which channels of a group go first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from robust_prune.adversaries import AdversarialSet
from robust_prune.errors import UsageError
from robust_prune.graph import Group, Groups, Importance, Slot
from robust_prune.registry import SCORES


def channel_scores(
    model: nn.Module,
    graph: Groups,
    *,
    score: str = "taylor",
    adversarial: AdversarialSet | None = None,
) -> dict[str, Tensor]:
    """Score every unit of every group, group by group as a pruner does; the lowest go first.

    Args:
        model: left as it was.
        graph: its groups.
        score: as `ChannelImportance` has them.
        adversarial: images to take gradients or activations on.

    Returns:
        By group, float64 scores [units] on the CPU; comparable between groups for `taylor` and
        `fisher` alone.
    """
    importance = ChannelImportance(model, score, adversarial)
    found: dict[str, Tensor] = {}
    for item in graph.groups:
        group = graph.group_of(item.name)
        found |= group.by_unit(importance(group))
    return found


class ChannelImportance(Importance):  # type: ignore[misc]
    """Scores of channels as one of torch-pruning's importances: for its pruners, and `compress`.

    Gradients and activations are measured for all groups of a graph at once, and anew when the
    model has changed.
    """

    def __init__(
        self, model: nn.Module, score: str = "taylor", adversarial: AdversarialSet | None = None
    ) -> None:
        """Choose what a channel is scored by.

        Args:
            model: left as it was.
            score: `l2`, the group's weight norm; `taylor` and `fisher`, the change of the
                adversarial loss when the unit goes, to first and second order; `reconstruction`,
                what its readers' outputs lose when the others make up for it; or
                `package.module:function`, which gives such scores.
            adversarial: images to take gradients or activations on; all but `l2` need them.
        """
        self._function = SCORES.find(score)
        if adversarial is None and not SCORES.fact(score, "data_free"):
            raise UsageError(f"score {score!r} needs adversarial images; use 'l2' without data")
        self._model, self._score, self._adversarial = model, score, adversarial
        self._measured: tuple[Groups, Any, Mapping[str, Tensor]] | None = None

    def __call__(self, group: Group) -> Tensor:
        """Return float64 scores [indices of the group's root] on the CPU."""
        return group.at_root(self.of_units(group.graph))

    def of_units(self, graph: Groups) -> Mapping[str, Tensor]:
        """Return by group the scores [units] of all groups of a graph."""
        state = tuple((id(p), p._version) for p in self._model.parameters())
        if self._measured is None or self._measured[0] is not graph or self._measured[1] != state:
            self._measured = graph, state, self._measure(graph)
        return self._measured[2]

    def _measure(self, graph: Groups) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = self._function(self._model, graph, self._adversarial)
        for group in graph.groups:
            values = found.get(group.name)
            if values is None or values.shape != (group.units,) or not values.isfinite().all():
                raise UsageError(
                    f"score {self._score!r} must give {group.units} finite numbers for group "
                    f"{group.name!r}"
                )
        return {group.name: found[group.name].detach().double().cpu() for group in graph.groups}


def sum_by_unit(slot: Slot, values: Tensor, units: int) -> Tensor:
    """Sum a parameter-shaped tensor over everything but a slot's channels, by unit.

    Returns float64 [units] on the CPU: sums of rows on the output side, of columns on the input
    side.
    """
    sums = values.movedim(slot.dim, 0).reshape(values.shape[slot.dim], -1).sum(1).double().cpu()
    return torch.zeros(units, dtype=torch.float64).index_add_(0, slot.units, sums[slot.indices])
