"""From where channels are stored to what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from robust_prune.errors import PlanError
from robust_prune.graph.costs import TensorCost, Use, WorkCost
from robust_prune.graph.tracing import Count
from robust_prune.graph.wiring import Wiring
from robust_prune.types import Cost, PruningPlan


def work_cost(net: nn.Module, wiring: Wiring) -> WorkCost:
    """Return the cost of a network as a function of the widths of its groups."""
    by_name = {group.name: group for group in wiring.groups}
    shares: dict[str, list[tuple[int, str, int]]] = {}
    for group in wiring.groups:
        for slot in wiring.slots[group.name]:
            each = len(slot.indices) // group.units
            shares.setdefault(slot.tensor, []).append((slot.dim, group.name, each))
    names = wiring.names

    def shrinking(times: int, counts: Sequence[Count]) -> Use:
        sizes = tuple(
            (
                count.value,
                tuple(
                    (names[g], len(units) // by_name[names[g]].units)
                    for g, _, units in count.where
                    if names.get(g) in by_name
                ),
            )
            for count in counts
        )
        return times, tuple(size for size in sizes if size[1])

    coupling = wiring.coupling
    tensors = tuple(
        TensorCost(
            name,
            tuple(p.shape),
            tuple(shares.get(name, ())),
            tuple(shrinking(*use) for use in coupling.uses.get(name, ())),
        )
        for name, p in net.named_parameters()
    )
    products = [shrinking(*use) for use in coupling.products]
    fixed = sum(times for times, sizes in products if not sizes)
    return WorkCost(tensors, ((fixed, ()), *(use for use in products if use[1])))


def check_counts(
    plan: PruningPlan, counted: Sequence[Cost], by_weights: Sequence[tuple[int, int]]
) -> None:
    """Raise PlanError where a plan records other costs than a model has, dense and pruned.

    Args:
        plan: what was recorded.
        counted: of the dense and the pruned model.
        by_weights: (multiply-adds, parameters) of both as plans of earlier versions count them.
    """
    recorded = plan.dense, plan.pruned
    for what, theirs, mine, old in zip(
        ("dense", "pruned"), recorded, counted, by_weights, strict=True
    ):
        if (theirs.macs, theirs.params) not in ((mine.macs, mine.params), old):
            raise PlanError(
                f"the plan says {theirs.macs:,} multiply-adds and {theirs.params:,} parameters "
                f"for the {what} model, this one has {mine.macs:,} and {mine.params:,}; was it "
                "made for another network or image size, or edited by hand?"
            )
