"""MRS as an importance class for plain torch-pruning code."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from robust_prune.adversaries import AdversarialSet, adversarial_set
from robust_prune.allocation import MAX_PRUNE_RATIO, group_weights
from robust_prune.criteria import channel_scores, sensitivities, structural_curves
from robust_prune.data import as_split
from robust_prune.errors import UsageError
from robust_prune.graph import MIN_WIDTH, ModelGraph
from robust_prune.modules import check_float32, network_of
from robust_prune.types import Curve, Sensitivity, ThreatModel

ALWAYS_KEPT = 1e3
MOST_BY_CURVE = 0.8  # single curves do not add up: none is trusted to the end


def _prices(
    graph: ModelGraph, curves: Mapping[str, Curve]
) -> Mapping[str, Callable[[int, Tensor], Tensor]]:
    """Return by group: (units now, their shares) to loss rise per multiply-add saved.

    Prices are divided by the largest, and rise with the share where the curve is straight.
    """
    dense = graph.cost().macs
    slopes: dict[str, tuple[Tensor, Tensor, int]] = {}
    for group in graph.groups:
        hull = curves[group.name].hull()
        saved = dense - graph.cost({group.name: group.width - group.blocks}).macs
        edges = torch.tensor([0.0, *hull.shares]).double()
        rises = torch.tensor([0.0, *hull.rises]).double()
        per_unit = rises.diff() / edges.diff() / group.units
        slopes[group.name] = per_unit / max(saved, 1), edges[1:-1], group.units
    top = max((float(s.max()) for s, _, _ in slopes.values()), default=0.0) or 1.0

    def price(name: str) -> Callable[[int, Tensor], Tensor]:
        slope, inner, units = slopes[name]

        def at(now: int, shares: Tensor) -> Tensor:
            gone = 1 - now * (1 - shares) / units  # of the units that there were
            return slope[torch.bucketize(gone, inner)] / top + 1e-4 * gone

        return at

    return {group.name: price(group.name) for group in graph.groups}


class MRSImportance(tp.importance.Importance):  # type: ignore[misc]
    """Adaptive ratios and adversarial channel scores, behind torch-pruning's interface.

    With `global_pruning=True` a pruner removes what lies under one threshold t, over all groups.
    By the rule `curve` the score of a channel is what its removal costs: the slope of its group's
    structural curve (rise of the adversarial loss against channels removed, lowest-scored first)
    per multiply-add saved, so that one threshold is one exchange rate of loss against cost, and no
    group loses more than 80 %. By `mrs` it is (rank inside the group / group size) / willingness,
    so that every group loses the share t * willingness, the ratios of `compress(allocation="mrs")`;
    `inverted` and `uniform` are its controls. Without global pruning only ranks inside a group
    count. What `compress` does beyond this, trying candidates and reconstructing layers, needs
    `compress`.

        importance = MRSImportance(model, (images, labels), threat=ThreatModel.linf("8/255"))
        tp.pruner.BasePruner(model, images[:1], importance=importance, global_pruning=True,
                             pruning_ratio=0.5, ignored_layers=[model.fc]).step()
    """

    def __init__(
        self,
        model: nn.Module,
        data_: Any,
        *,
        threat: ThreatModel | None = None,
        rule: str = "curve",
        score: str = "l2",
        method: str = "first-order",
        n: int = 512,
        steps: int = 10,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        """Measure MRS, and curves where the rule asks for them, once, on the model as it is.

        Args:
            model: the module to be pruned, on images in [0, 1].
            data_: (images, labels) tensors, a loader, or any iterable of such batches, from
                training or held-out images.
            threat: default Linf 8/255.
            rule: `curve`, `mrs`, `inverted` or `uniform`.
            score: `l2`, or `taylor`, `fisher` or `reconstruction` on the adversarial images.
            method: `first-order` or `ascent`.
            n: images to measure on.
            steps: PGD steps for the adversarial set.
            seed: for drawing images and starting PGD.
            batch_size: images at a time.
        """
        if method == "structural":
            raise UsageError("structural MRS is what rule='curve' uses; method is for rule='mrs'")
        check_float32(model)
        images, labels = as_split(data_).take(n, seed)
        self.rule, self.score = rule, score
        self._model = model
        self._adversarial: AdversarialSet = adversarial_set(
            model,
            images,
            labels,
            threat=threat or ThreatModel.linf("8/255"),
            steps=steps,
            seed=seed,
            batch_size=batch_size,
        )
        channels, height, width = images.shape[1:]
        self._input_size = channels, height, width
        self._cache: tuple[Any, ModelGraph, Mapping[str, Tensor]] | None = None
        graph = ModelGraph(model, self._input_size)
        self.sensitivity: Sensitivity = sensitivities(
            model, self._adversarial, method=method, groups=graph.groups
        )
        self.willingness: Mapping[str, float] = {}
        self.curves: Mapping[str, Curve] = {}
        if rule == "curve":
            scores = channel_scores(model, graph, score=score, adversarial=self._adversarial)
            self.curves = structural_curves(model, graph, scores, self._adversarial)
            self._prices = _prices(graph, self.curves)
        else:
            self.willingness = group_weights(rule, self.sensitivity.of_groups())
        self._order = {group.name: i for i, group in enumerate(graph.groups)}

    def __repr__(self) -> str:
        s = self.sensitivity
        return (
            f"MRSImportance(rule={self.rule}, score={self.score}, MRS={s.method} on {s.n} images, "
            f"{s.attack} {s.threat}, seed={s.seed})"
        )

    def __call__(self, group: Any) -> Tensor:
        """Return scores [channels of the group's root]; the lowest are pruned.

        Channels that a grouped convolution can only lose together have the same score.

        Raises:
            UsageError: the group is none that was measured, because the pruner's graph was built
                on another model.
        """
        names = {module: name for name, module in network_of(self._model).named_modules()}
        root = group[0].dep.target.module
        graph, scores = self._scores_now()
        made = [
            (name, slot)
            for name in self._order
            if name in scores
            for slot in graph.slots(name)
            if slot.role == "out" and slot.layer == names.get(root)
        ]
        if not made:
            raise UsageError(
                f"MRSImportance has not measured the group of {names.get(root, root)}; give the "
                "pruner the same model, and the classifier in ignored_layers"
            )
        # channels that can't be removed are kept by every threshold
        values = torch.full((root.weight.shape[made[0][1].dim],), 2 * ALWAYS_KEPT).double()
        for name, slot in made:
            values[slot.indices] = self._values(name, scores[name])[slot.units]
        device = next(self._model.parameters()).device
        return values[list(group[0].idxs)].to(device, torch.float32)

    def _values(self, name: str, units: Tensor) -> Tensor:
        """Return comparable scores [units] of a group: ranks, weighted by its willingness."""
        n = len(units)
        ranks = torch.empty(n, dtype=torch.float64)
        ranks[units.argsort(stable=True)] = torch.arange(n, dtype=torch.float64)
        # half a rank off, and a hair per group: torch-pruning removes ties, all of them
        offset = 0.5 + 1e-3 * self._order[name] / (1 + len(self._order))
        if self.rule == "curve":
            values, most = self._prices[name](n, (ranks + offset) / n), MOST_BY_CURVE
        else:
            values = (ranks + offset) / n / self.willingness[name]
            most = MAX_PRUNE_RATIO
        # a group that lies wholly under the threshold would be skipped, so its best stay above
        least = min(n, max(MIN_WIDTH, math.ceil((1 - most) * n)))
        values[ranks >= n - least] += ALWAYS_KEPT
        return values

    def _scores_now(self) -> tuple[ModelGraph, Mapping[str, Tensor]]:
        """Score all groups at once, anew whenever the model has other parameters than before."""
        key = tuple((id(p), p._version) for p in self._model.parameters())
        if self._cache is None or self._cache[0] != key:
            graph = ModelGraph(self._model, self._input_size, probe=False)
            scores = channel_scores(
                self._model,
                graph,
                score=self.score,
                adversarial=self._adversarial,
            )
            self._cache = key, graph, scores
        return self._cache[1], self._cache[2]
