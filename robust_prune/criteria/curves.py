"""Structural sensitivity: the adversarial loss against the share of a group's channels removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robust_prune.adversaries import AdversarialSet, adversarial_loss
from robust_prune.graph import ModelGraph
from robust_prune.modules import (
    channels_last,
    evaluating,
    network_of,
    requires_grad,
    takes_channels_last,
)
from robust_prune.types import LARGEST_RISE, Curve

SHARES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
IMAGE_PASSES = 20_000  # what all points together may cost: a fifth of an epoch on 10,000 images
FEWEST_IMAGES, FEW_IMAGES, MOST_IMAGES = 8, 32, 384


@torch.no_grad()
def structural_curves(
    model: nn.Module,
    graph: ModelGraph,
    scores: Mapping[str, Tensor],
    adversarial: AdversarialSet,
    *,
    shares: Sequence[float] = SHARES,
    passes: int = IMAGE_PASSES,
    fewest: int = FEWEST_IMAGES,
    quick: bool = False,
) -> dict[str, Curve]:
    """Measure every group's curve by forward passes of the masked model.

    The columns that read a group's lowest-scored units are set to zero, and put back: no copies,
    no tracing. Statistics of norms over channels still run over all of them.

    Args:
        model: left as it was.
        graph: its groups.
        scores: by group [units]; the lowest go first.
        adversarial: images made at the model as it is; as many as `passes` allow are used.
        shares: of the units to remove, rising; every other one where images would get few.
        passes: images times forward passes, over all points.
        fewest: images that every point takes, whatever `passes` say.
        quick: pass channels last where the model takes that, which is the same up to rounding, and
            leave the largest share out where `passes` do not suffice for `fewest` images.
    """
    points = max(len(graph.groups) * len(shares), 1)
    if passes // points < FEW_IMAGES and len(shares) > 1:
        shares = shares[1::2]
        points = max(len(graph.groups) * len(shares), 1)
    if quick and passes // points < fewest and len(shares) > 2:
        shares = shares[:-1]
        points = max(len(graph.groups) * len(shares), 1)
    n = max(fewest, min(MOST_IMAGES, passes // points))
    used = adversarial.first(n)
    curves: dict[str, Curve] = {}
    quick = quick and takes_channels_last(model, used.images[:1])
    with evaluating(model), requires_grad(model, False), channels_last(model, quick):
        base = adversarial_loss(model, used)
        for group in graph.groups:
            order = scores[group.name].argsort(stable=True)
            done: dict[int, float] = {}
            for share in shares:
                count = min(max(1, round(share * group.units)), group.units - 1)
                if count not in done:
                    gone = torch.zeros(group.units, dtype=torch.bool)
                    gone[order[:count]] = True
                    with masked(model, graph, group.name, gone):
                        rise = adversarial_loss(model, used) - base
                    done[count] = rise if rise < LARGEST_RISE else LARGEST_RISE  # NaN too
            curves[group.name] = Curve(
                group.name,
                tuple(count / group.units for count in sorted(done)),
                tuple(done[count] for count in sorted(done)),
            )
    return curves


@contextmanager
def masked(
    model: nn.Module,
    graph: ModelGraph,
    group: str,
    gone: Tensor,
) -> Iterator[None]:
    """Let nothing read the units of a group that are `gone` [units], and put weights back."""
    net = network_of(model)
    tensors = {name: p.detach() for name, p in net.named_parameters()}
    dropped: dict[str, tuple[int, Tensor]] = {}
    for slot in (*(s for s in graph.slots(group) if s.role == "in"), *graph.gates(group)):
        entries = slot.indices[gone[slot.units]]
        _, before = dropped.get(slot.tensor, (slot.dim, entries[:0]))
        dropped[slot.tensor] = slot.dim, torch.cat([before, entries])
    kept = {name: tensors[name].clone() for name in dropped}
    try:
        for name, (dim, entries) in dropped.items():
            tensors[name].index_fill_(dim, entries.to(tensors[name].device), 0.0)
        yield
    finally:
        for name, weight in kept.items():
            tensors[name].copy_(weight)


def removal_prices(
    graph: ModelGraph, curves: Mapping[str, Curve]
) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """Return by group: shares of the dense units to loss rise per multiply-add saved.

    Prices are divided by the largest, and rise with the share where the curve is straight.
    """
    dense = graph.cost().macs
    slopes: dict[str, tuple[Tensor, Tensor]] = {}
    for group in graph.groups:
        hull = curves[group.name].hull()
        saved = dense - graph.cost({group.name: group.width - group.blocks}).macs
        edges = torch.tensor([0.0, *hull.shares]).double()
        rises = torch.tensor([0.0, *hull.rises]).double()
        per_unit = rises.diff() / edges.diff() / group.units
        slopes[group.name] = per_unit / max(saved, 1), edges[1:-1]
    top = max((float(s.max()) for s, _ in slopes.values()), default=0.0) or 1.0

    def price(name: str) -> Callable[[Tensor], Tensor]:
        slope, inner = slopes[name]

        def at(gone: Tensor) -> Tensor:
            return slope[torch.bucketize(gone, inner)] / top + 1e-4 * gone

        return at

    return {group.name: price(group.name) for group in graph.groups}
