"""Structural sensitivity: the adversarial loss against the share of a group's channels removed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.adversaries import AdversarialSet
from robust_prune.graph import ModelGraph
from robust_prune.modules import (
    Replay,
    as_memory_allows,
    channels_last,
    evaluating,
    network_of,
    requires_grad,
    takes_channels_last,
)
from robust_prune.types import LARGEST_RISE, Curve

SHARES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
IMAGE_PASSES = 20_000  # what all points together may cost: a fifth of an epoch on 10,000 images
REPLAYED_BYTES = 1 << 29  # of a batch's activations
PASSES_TO_PAY = 12  # of images for a group, from which on shortened passes pay for their proof
Point = tuple[str, int] | None  # a group and how many of its units are gone; None for none
DEAR = 2.0  # the price of what leaves no finite loss; others are at most about 1
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
    without_largest: bool = False,
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
        quick: pass channels last where the model takes that, which is the same up to rounding.
        without_largest: leave the largest share out where `passes` do not suffice for `fewest`
            images.
    """
    points = max(len(graph.groups) * len(shares), 1)
    if passes // points < FEW_IMAGES and len(shares) > 1:
        shares = shares[1::2]
        points = max(len(graph.groups) * len(shares), 1)
    if without_largest and passes // points < fewest and len(shares) > 2:
        shares = shares[:-1]
        points = max(len(graph.groups) * len(shares), 1)
    n = max(fewest, min(MOST_IMAGES, passes // points))
    used = adversarial.first(n)
    removed = {group.name: _removed(group.units, shares) for group in graph.groups}
    orders = {group.name: scores[group.name].argsort(stable=True) for group in graph.groups}
    quick = quick and takes_channels_last(model, used.images[:1])
    with evaluating(model), requires_grad(model, False), channels_last(model, quick):
        losses = _losses(model, graph, removed, orders, used)
    base = losses[None]
    curves: dict[str, Curve] = {}
    for group in graph.groups:
        rises = {count: losses[group.name, count] - base for count in removed[group.name]}
        curves[group.name] = Curve(
            group.name,
            tuple(count / group.units for count in sorted(rises)),
            tuple(  # NaN too
                rise if (rise := rises[count]) < LARGEST_RISE else LARGEST_RISE
                for count in sorted(rises)
            ),
            len(used),
        )
    return curves


def _removed(units: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Return how many units each point removes, every number once."""
    return tuple(dict.fromkeys(min(max(1, round(share * units)), units - 1) for share in shares))


def _losses(
    model: nn.Module,
    graph: ModelGraph,
    removed: Mapping[str, Sequence[int]],
    orders: Mapping[str, Tensor],
    used: AdversarialSet,
) -> dict[Point, float]:
    """Return the mean adversarial loss at every point, and of the model as it is.

    What lies in front of a group's readers is computed once for all points.
    """
    points = [(name, count) for name, counts in removed.items() for count in counts]
    replay, readers = Replay(model, REPLAYED_BYTES), dict[str, tuple[str, ...]]()
    if len(points) * len(used) >= PASSES_TO_PAY * len(removed):
        readers = _proven(replay, graph, orders, used)

    def summed(images: Tensor, labels: Tensor, size: int) -> dict[Point, float]:
        sums: dict[Point, float] = dict.fromkeys([None, *points], 0.0)
        for part, target in zip(torch.split(images, size), torch.split(labels, size), strict=True):
            logits = replay.record(part) if readers else model(part)
            sums[None] += float(F.cross_entropy(logits, target, reduction="sum"))
            for name, count in points:
                gone = _lowest(orders[name], count)
                with masked(model, graph, name, gone), replay.before(readers.get(name, ("",))):
                    logits = model(part)
                sums[name, count] += float(F.cross_entropy(logits, target, reduction="sum"))
        replay.forget()
        return sums

    totals: dict[Point, float] = dict.fromkeys([None, *points], 0.0)
    for images, labels in used.batches():
        work = functools.partial(summed, images, labels)
        for point, loss in as_memory_allows(work, len(images), "losses").items():
            totals[point] += loss
    return {point: total / len(used) for point, total in totals.items()}


def _proven(
    replay: Replay, graph: ModelGraph, orders: Mapping[str, Tensor], used: AdversarialSet
) -> dict[str, tuple[str, ...]]:
    """Return the layers that a group's mask changes, for groups whose passes can be shortened.

    A group is among them if a shortened pass of an image gives the very numbers of a whole one.
    """
    model, readers = replay.model, dict[str, tuple[str, ...]]()
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        return readers  # its replicas run with other weights
    owners = _owners(network_of(model))
    changed = {
        name: tuple({layer for slot in graph.readers(name) for layer in owners[slot.tensor]})
        for name in orders
    }
    image = used.images[:1]
    try:
        replay.look_at(image, min(used.batch_size, len(used)))
        replay.record(image)
        for name, order in orders.items():
            with masked(model, graph, name, _lowest(order, max(1, len(order) // 2))):
                whole = model(image)
                model(1 - image)  # what a module left for code behind it is then another image's
                with replay.before(changed[name]):
                    if torch.equal(model(image), whole):
                        readers[name] = changed[name]
    except Exception:  # noqa: BLE001 - a user's module may raise anything; passes stay whole
        readers.clear()
    replay.forget()
    return readers


def _owners(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return by parameter the modules that hold it; more than one where they share it."""
    held: dict[int, list[str]] = {}
    for name, module in net.named_modules():
        for parameter in module.parameters(recurse=False):
            held.setdefault(id(parameter), []).append(name)
    return {name: tuple(held[id(p)]) for name, p in net.named_parameters()}


def _lowest(order: Tensor, count: int) -> Tensor:
    """Return booleans [units]: the first `count` in order."""
    gone = torch.zeros(len(order), dtype=torch.bool)
    gone[order[:count]] = True
    return gone


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
    for slot in graph.readers(group):
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

    Prices are divided by the largest finite one, and rise with the share where the curve is
    straight. A loss that is not finite costs more than any that is.
    """
    dense = graph.cost().macs
    slopes: dict[str, tuple[Tensor, Tensor]] = {}
    for group in graph.groups:
        hull = curves[group.name].hull()
        saved = dense - graph.cost({group.name: group.width - group.blocks}).macs
        edges = torch.tensor([0.0, *hull.shares]).double()
        rises = torch.tensor([0.0, *hull.rises]).double()
        per_unit = rises.diff() / edges.diff() / group.units
        per_unit[rises[1:] >= LARGEST_RISE] = torch.inf
        slopes[group.name] = per_unit / max(saved, 1), edges[1:-1]
    finite = torch.cat([torch.zeros(1), *(s[s.isfinite()] for s, _ in slopes.values())])
    top = float(finite.max()) or 1.0

    def price(name: str) -> Callable[[Tensor], Tensor]:
        slope, inner = slopes[name]
        price_of = torch.where(slope.isfinite(), slope / top, DEAR)

        def at(gone: Tensor) -> Tensor:
            return price_of[torch.bucketize(gone, inner)] + 1e-4 * gone

        return at

    return {group.name: price(group.name) for group in graph.groups}
