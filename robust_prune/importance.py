"""MRS as an importance class for plain torch-pruning code."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from robust_prune.adversaries import AdversarialSet, adversarial_set
from robust_prune.allocation import MAX_PRUNE_RATIO, RULES, TOLERANCE, group_weights, ratio_for
from robust_prune.criteria import (
    STAYS,
    ChannelImportance,
    LimitedScores,
    removal_prices,
    sensitivities,
    structural_curves,
)
from robust_prune.data import as_split
from robust_prune.errors import UsageError
from robust_prune.graph import Group, ModelGraph, count_cost
from robust_prune.modules import check_float32, check_outputs, network_of
from robust_prune.types import Budget, ChannelGroup, Curve, Sensitivity, Target, ThreatModel

MOST_BY_CURVE = 0.8  # single curves do not add up: none is trusted to the end
OUTPUTS = "its channels are the model's outputs"


class MRSImportance(tp.importance.Importance):  # type: ignore[misc]
    """Adaptive ratios and adversarial channel scores, behind torch-pruning's interface.

    With `global_pruning=True` a pruner removes what lies under one threshold t, over all groups.
    By the rule `curve` the score of a channel is what its removal costs: the slope of its group's
    structural curve (rise of the adversarial loss against channels removed, lowest-scored first)
    per multiply-add saved, so that one threshold is one exchange rate of loss against cost, and no
    group loses more than 80 %. By `mrs` it is (rank inside the group / group size) / willingness,
    so that every group loses the share t * willingness, the ratios of `compress(allocation="mrs")`;
    `inverted` and `uniform` are its controls; there 95 % may go. Without global pruning only ranks
    inside a group count. What `compress` does beyond this, trying candidates and reconstructing
    layers, needs `compress`.

    What a group keeps is a share of its dense width, in any mode and after any number of steps. A
    pruner that asks for more than can go takes all that can, and a warning says so.

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
        max_prune_ratio: float | None = None,
        round_to: int = 1,
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
            max_prune_ratio: share of a group's dense width that may go at most, in (0, 1); default
                0.8 by `curve`, else 0.95. A pruner's own `max_pruning_ratio` is no limit: it looks
                at widths before a step alone.
            round_to: what the pruner is given, so that the least that stays is a multiple, too.
        """
        counts = {"round_to": round_to, "n": n, "steps": steps, "batch_size": batch_size}
        _check_options(rule, method, max_prune_ratio, counts)
        check_float32(model)
        images, labels = as_split(data_).take(n, seed)
        check_outputs(model, images, labels)
        self.rule, self.score, self.round_to = rule, score, round_to
        self.max_prune_ratio = max_prune_ratio or (
            MOST_BY_CURVE if rule == "curve" else MAX_PRUNE_RATIO
        )
        self._model = model
        self._adversarial: AdversarialSet = adversarial_set(
            model,
            images,
            labels,
            threat=ThreatModel.checked(threat),
            steps=steps,
            seed=seed,
            batch_size=batch_size,
        )
        channels, height, width = images.shape[1:]
        self._input_size = channels, height, width
        self._cache: tuple[Any, ModelGraph, Mapping[str, Tensor]] | None = None
        self._importance = ChannelImportance(model, score, self._adversarial)
        graph = ModelGraph(model, self._input_size)
        self.sensitivity: Sensitivity = sensitivities(
            model, self._adversarial, method=method, groups=graph.groups
        )
        self.willingness: Mapping[str, float] = {}
        self.curves: Mapping[str, Curve] = {}
        if rule == "curve":
            scores = self._importance.of_units(graph)
            self.curves = structural_curves(model, graph, scores, self._adversarial)
            self._prices = removal_prices(graph, self.curves)
        else:
            self.willingness = group_weights(rule, self.sensitivity.of_groups())
        self._order = {group.name: i for i, group in enumerate(graph.groups)}
        self._dense: Mapping[str, ChannelGroup] = {group.name: group for group in graph.groups}
        self._ties = graph.ties
        self._outputs = {item.name for item in graph.unprunable if item.reason == OUTPUTS}

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
        device = next(self._model.parameters()).device
        if isinstance(group, Group):
            scores = self._importance.of_units(group.graph)
            self._check_measured(group.units)
            prices = {name: self._values(name, scores[name]) for name in group.units}
            values = group.at_root(prices, other=2 * STAYS)
            return LimitedScores.of(values.to(device, torch.float32), ", ".join(prices))
        names = {module: name for name, module in network_of(self._model).named_modules()}
        root = group[0].dep.target.module
        graph, scores = self._scores_now()
        made = [
            (name, slot)
            for name, now in self._names_now(graph.groups).items()
            for slot in graph.slots(now)
            if slot.role == "out" and slot.layer == names.get(root)
        ]
        layer = names.get(root)
        if layer is None or (not made and layer in self._outputs):
            raise UsageError(
                f"MRSImportance has not measured the group of {layer or root}; give the "
                "pruner the same model, and the classifier in ignored_layers"
            )
        size = root.weight.shape[made[0][1].dim] if made else 1 + max(group[0].idxs)
        values = 2 * STAYS + torch.arange(size).double() / size  # those that can't be removed
        for name, slot in made:
            values[slot.indices] = self._values(name, scores[name])[slot.units]
        values = values[list(group[0].idxs)].to(device, torch.float32)
        return LimitedScores.of(values, layer)

    def _values(self, name: str, units: Tensor) -> Tensor:
        """Return comparable scores [units] of a group: ranks, weighted by its willingness.

        From `STAYS` on they are those of units that stay.
        """
        n, dense = len(units), self._dense[name]
        ranks = torch.empty(n, dtype=torch.float64)
        ranks[units.argsort(stable=True)] = torch.arange(n, dtype=torch.float64)
        # half a rank off, and a hair per group: torch-pruning removes ties, all of them
        offset = 0.5 + 1e-3 * self._order[name] / (1 + len(self._order))
        gone = 1 - (n - ranks - offset) / dense.units  # of the dense units, once this one is
        curve = self.rule == "curve"
        values = self._prices[name](gone) if curve else gone / self.willingness[name]
        values[ranks >= n - self._least(dense)] += STAYS
        return values

    def _least(self, dense: ChannelGroup) -> int:
        """Return how many units of a group stay, in steps that `round_to` allows."""
        most = math.floor(self.max_prune_ratio * dense.units + 1e-9)  # 0.95 * 20 is below 19
        step = math.lcm(dense.blocks, self.round_to) // dense.blocks
        return math.ceil(max(dense.min_units, dense.units - most) / step) * step

    def _names_now(self, groups: Sequence[ChannelGroup]) -> dict[str, str]:
        """Return by the dense model's name of each group the one it has now.

        Groups that share a tensor are named after their first channel in it, which moves; their
        order stays.
        """
        found: dict[str, str] = {}
        here, there = _by_title(self._dense), _by_title(group.name for group in groups)
        for title, names in here.items():
            if len(names) == len(there.get(title, ())):
                found.update(zip(names, there[title], strict=True))
        return found

    def for_budget(
        self,
        prune_ratio: float,
        example_inputs: Any,
        *,
        target: Target = "macs",
        pruner: Callable[..., Any] = tp.pruner.BasePruner,
        **options: Any,
    ) -> Any:
        """Return a pruner of this model whose steps together remove a share of its cost.

        Its `pruning_ratio`, a share of channels, is bisected on copies of the model, on which the
        pruner runs all its steps with the weights as they are; the cost is counted on what is left.
        Some ten trials, each about as long as a step. `max_pruning_ratio` and `round_to` hold as
        limits of what every group keeps.

            importance.for_budget(0.5, images[:1], ignored_layers=[model.fc]).step()

        Args:
            prune_ratio: share of `target` to remove, in (0, 1).
            example_inputs: as pruners take them.
            target: `macs` or `params`.
            pruner: torch-pruning's class, or anything with its signature.
            options: for the pruner; ranking is global unless they say otherwise.

        Raises:
            BudgetError: the budget is out of reach; the message says what is possible.
        """
        if target == "channels":
            raise UsageError("a share of channels is what pruning_ratio is: give it to the pruner")
        budget = Budget(target, prune_ratio)
        importance = self._limited(options)
        # torch-pruning's defaults for these are shared by all pruners, and written to
        fresh: dict[str, Any] = {n: {} for n in ("in_channel_groups", "out_channel_groups")}
        options = {"global_pruning": True, "num_heads": {}, **fresh, **options}
        dense = count_cost(self._model, self._input_size).of(target)

        def reached(ratio: float) -> float:
            ours = (self._adversarial, self._cache)  # the same for a copy
            memo = {id(shared): shared for shared in ours}
            tried, inputs, more = copy.deepcopy((importance, example_inputs, options), memo)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trial = pruner(tried._model, inputs, importance=tried, pruning_ratio=ratio, **more)
                for _ in range(more.get("iterative_steps", 1)):
                    trial.step()
            return 1 - count_cost(tried._model, self._input_size).of(target) / dense

        ratio, share = ratio_for(budget, reached)
        if abs(share - prune_ratio) > TOLERANCE:
            warnings.warn(
                f"asked to remove {100 * prune_ratio:.1f} % of the {target}, {100 * share:.1f} % "
                "will go: the groups are too narrow for a closer fit",
                stacklevel=2,
            )
        return pruner(
            self._model, example_inputs, importance=importance, pruning_ratio=ratio, **options
        )

    def _limited(self, options: Mapping[str, Any]) -> MRSImportance:
        """Return this importance with a pruner's limits as its own."""
        limited = copy.copy(self)
        most, step = options.get("max_pruning_ratio", 1.0), options.get("round_to") or 1
        limited.max_prune_ratio = min(self.max_prune_ratio, most)
        limited.round_to = math.lcm(self.round_to, step)
        return limited

    def _check_measured(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._order:
                raise UsageError(
                    f"MRSImportance has not measured the group of {name}; it was made for another "
                    "model, or for this one as it was before something was pruned"
                )

    def _scores_now(self) -> tuple[ModelGraph, Mapping[str, Tensor]]:
        """Score all groups of torch-pruning's own graph, traced anew when the model has changed."""
        key = tuple((id(p), p._version) for p in self._model.parameters())
        if self._cache is None or self._cache[0] != key:
            graph = ModelGraph(self._model, self._input_size, probe=False, ties=self._ties)
            found = self._importance.of_units(graph)
            scores = {name: found[now] for name, now in self._names_now(graph.groups).items()}
            self._cache = key, graph, scores
        return self._cache[1], self._cache[2]


def _by_title(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of groups by the tensor that stands for them, in their order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rpartition("@")[0] or name, []).append(name)
    return found


def _check_options(
    rule: str, method: str, max_prune_ratio: float | None, counts: Mapping[str, int]
) -> None:
    if method == "structural":
        raise UsageError("structural MRS is what rule='curve' uses; method is for rule='mrs'")
    if max_prune_ratio is not None and not 0 < max_prune_ratio < 1:
        raise UsageError(f"max_prune_ratio {max_prune_ratio:g} must lie between 0 and 1")
    for name, number in counts.items():
        if number < 1:
            raise UsageError(f"{name} must be at least 1, not {number}")
    if rule not in ("curve", *RULES):
        raise UsageError(f"rule {rule!r} is not known; use one of curve, {', '.join(RULES)}")
