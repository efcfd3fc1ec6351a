"""Structural sensitivity: the adversarial loss against the share of a group's channels removed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robust_prune.graph import ModelGraph
from robust_prune.modules import evaluating, network_of, requires_grad
from robust_prune.mrs import AdversarialSet, Method, adversarial_loss, sensitivities
from robust_prune.scores import channel_scores
from robust_prune.types import GroupSensitivity, Sensitivity

SHARES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
IMAGE_PASSES = 20_000  # what all points together may cost: a fifth of an epoch on 10,000 images
FEWEST_IMAGES, FEW_IMAGES, MOST_IMAGES = 8, 32, 384
LARGEST_RISE = 1e6  # for a loss that is not finite


@dataclass(frozen=True)
class Curve:
    """Rise of the mean adversarial loss, in nats, when the lowest-scored units of a group go.

    `shares[i]` of the units gone costs `rises[i]`; no units gone costs nothing.
    """

    group: str
    shares: tuple[float, ...]
    rises: tuple[float, ...]

    def at(self, share: float) -> float:
        """Return the rise at a share of units in [0, 1], by straight lines between the points.

        The last line goes on beyond the last point.
        """
        points = [(0.0, 0.0), *zip(self.shares, self.rises, strict=True)]
        x, y, slope = 0.0, 0.0, 0.0
        for (x, y), (next_x, next_y) in itertools.pairwise(points):
            slope = (next_y - y) / (next_x - x)
            if share <= next_x:
                break
        return y + slope * (share - x)

    def hull(self) -> Curve:
        """Return the convex curve below this one that never falls, for trading by slopes.

        Noise must not pay for removing channels, so that rises count from the largest before.
        """
        points, highest = [(0.0, 0.0)], 0.0
        for share, rise in zip(self.shares, self.rises, strict=True):
            highest = max(highest, rise)
            while len(points) > 1 and _slope(*points[-2:]) >= _slope(points[-1], (share, highest)):
                points.pop()
            points.append((share, highest))
        shares, rises = zip(*points[1:], strict=True)
        return Curve(self.group, shares, rises)


def _slope(first: tuple[float, float], second: tuple[float, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


@torch.no_grad()
def structural_curves(
    model: nn.Module,
    graph: ModelGraph,
    scores: Mapping[str, Tensor],
    adversarial: AdversarialSet,
    *,
    shares: Sequence[float] = SHARES,
    passes: int = IMAGE_PASSES,
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
    """
    points = max(len(graph.groups) * len(shares), 1)
    if passes // points < FEW_IMAGES and len(shares) > 1:
        shares = shares[1::2]
        points = max(len(graph.groups) * len(shares), 1)
    n = max(FEWEST_IMAGES, min(MOST_IMAGES, passes // points))
    used = adversarial.first(n)
    curves: dict[str, Curve] = {}
    with evaluating(model), requires_grad(model, False):
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


def structural(
    graph: ModelGraph,
    curves: Mapping[str, Curve],
    adversarial: AdversarialSet,
    seconds: float = 0.0,
) -> Sensitivity:
    """Return structural MRS: the rise of the adversarial loss when half of a group goes.

    It belongs to groups; `modules` stays empty.
    """
    with evaluating(graph.model):
        loss = adversarial_loss(graph.model, adversarial)
    return Sensitivity(
        method="structural",
        rho=0.5,
        threat=adversarial.threat,
        attack=adversarial.attack,
        n=len(adversarial),
        seed=adversarial.seed,
        adversarial_loss=loss,
        seconds=seconds,
        modules=(),
        groups=tuple(
            GroupSensitivity(g.name, g.width, max(curves[g.name].at(0.5), 0.0), g.name)
            for g in graph.groups
        ),
    )


def measure_mrs(
    graph: ModelGraph,
    adversarial: AdversarialSet,
    method: Method,
    scores: Mapping[str, Tensor] | None = None,
    **more: Any,
) -> Sensitivity:
    """Measure MRS by any of its estimators; `structural` takes l2 scores where none are given."""
    model = graph.model
    if method != "structural":
        return sensitivities(model, adversarial, method=method, groups=graph.groups, **more)
    start = time.perf_counter()
    scores = scores or channel_scores(model, graph, score="l2")
    curves = structural_curves(model, graph, scores, adversarial, shares=(0.5,))
    return structural(graph, curves, adversarial, time.perf_counter() - start)


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
