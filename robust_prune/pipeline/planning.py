"""The first stations of a compression: what is measured on the model, and the plan made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from robust_prune.adversaries import AdversarialSet, adversarial_set
from robust_prune.allocation import (
    PASSES,
    STEPS,
    allocate,
    best_composed,
    candidate_widths,
    group_weights,
    make_plan,
)
from robust_prune.criteria import (
    IMAGE_PASSES,
    calibration_images,
    channel_scores,
    measure_mrs,
    structural_curves,
)
from robust_prune.data import DataSplits
from robust_prune.graph import ModelGraph
from robust_prune.modules import device_of
from robust_prune.pipeline.journal import Journal
from robust_prune.pipeline.settings import CALIBRATION_IMAGES, Settings
from robust_prune.repair import Reconstruction, kept_rows, recalibrate_batchnorm_
from robust_prune.types import Curve, PruningPlan, Sensitivity

CPU_MACS = 10**13  # some minutes of a few cores
SEARCH_IMAGES = 16, 256  # at least, at most


@dataclass(frozen=True)
class Planned:
    """A plan, and the sensitivity that it was made with."""

    plan: PruningPlan
    sensitivity: Sensitivity

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Planned:
        """Build it from parsed JSON."""
        return cls(
            PruningPlan.from_plain(plain["plan"]), Sensitivity.from_plain(plain["sensitivity"])
        )


class Planning:
    """Measures a model and makes the plan; keeps what repairs the pruned model afterwards."""

    def __init__(
        self,
        model: nn.Module,
        splits: DataSplits | None,
        settings: Settings,
        journal: Journal,
        input_size: tuple[int, int, int],
    ) -> None:
        self.model, self.splits, self.settings, self.journal = model, splits, settings, journal
        self.input_size = input_size
        self.device = device_of(model)
        with journal.timed("graph"):
            self.graph = graph_of(model, input_size, settings)
        journal.parts["reachable"] = self.graph.reachable
        self.reconstruction: Reconstruction | None = None

    def measure_and_plan(self, known: Planned | None = None) -> Planned:
        """Make the adversarial set, scores, curves, MRS and the plan.

        With `known`, made before, only what the repair of the pruned model needs is made again.
        """
        settings, model, graph = self.settings, self.model, self.graph
        with self.journal.timed("adversarial set"):
            self.journal.stage(f"adversarial set: PGD-10, {settings.threat}")
            n = self._calibration_count(quiet=known is not None)
            size = self.input_size
            self._calibration = calibration_images(model, self.splits, size, n, settings.seed)
            adversarial = adversarial_set(
                model,
                *self._calibration,
                threat=settings.threat,
                seed=settings.seed,
                batch_size=min(64, settings.batch_size),
            )
        if known is not None:
            self.reconstruction = self._reconstruction(adversarial)
            return known
        values: Mapping[str, Tensor] = {}
        curves: Mapping[str, Curve] = {}
        if settings.plan is None:
            with self.journal.timed("scores"):
                score = settings.score
                values = channel_scores(model, graph, score=score, adversarial=adversarial)
            if settings.allocation == "curve":
                self.journal.stage(f"curves of {len(graph.groups)} groups")
                passes = self._image_passes()
                with self.journal.timed("curves"):
                    curves = structural_curves(model, graph, values, adversarial, passes=passes)
                self.journal.parts["curves"] = list(curves.values())
        with self.journal.timed("sensitivity"):
            self.journal.stage(f"module robustness sensitivity: {settings.estimator}")
            sensitivity = measure_mrs(graph, adversarial, settings.estimator, values)
        self.reconstruction = self._reconstruction(adversarial)
        with self.journal.timed("plan"):
            plan = settings.plan or self._make_plan(sensitivity, values, curves)
            if settings.plan is not None:
                graph.check(settings.plan)
                self.journal.note(f"replayed plan {settings.plan.digest}")
        return Planned(plan, sensitivity)

    def check_feasible(self) -> None:
        """Fail before the expensive stations where the budget can't be met."""
        graph = self.graph
        if self.settings.plan is None:
            equal = dict.fromkeys((g.name for g in graph.groups), 1.0)
            allocate(
                graph.groups,
                graph.cost,
                self.settings.budget,
                equal,
                max_prune_ratio=self.settings.max_prune_ratio,
                round_to=self.settings.round_to,
            )

    def _reconstruction(self, adversarial: AdversarialSet) -> Reconstruction | None:
        """Note what the dense model does on adversarial images and on as many clean ones."""
        if self.splits is None or not self.settings.reconstruct:
            return None
        with self.journal.timed("reconstruction"):
            train = self.splits.train
            clean, _ = train.take(min(len(adversarial), len(train)), self.settings.seed + 1)
            pairs = zip(adversarial.images, clean.to(self.device), strict=False)
            images = torch.stack([image for pair in pairs for image in pair])
            return Reconstruction.of(self.model, images)

    def _make_plan(
        self,
        sensitivity: Sensitivity,
        values: Mapping[str, Tensor],
        curves: Mapping[str, Curve],
    ) -> PruningPlan:
        settings, graph = self.settings, self.graph
        by_group = sensitivity.of_groups()

        def plan(widths: Mapping[str, int]) -> PruningPlan:
            return make_plan(
                graph.groups,
                widths,
                {name: v.tolist() for name, v in values.items()},
                graph.cost,
                settings.budget,
                allocation=settings.allocation,
                score=settings.score,
                seed=settings.seed,
                input_size=self.input_size,
                mrs=by_group,
                max_prune_ratio=settings.max_prune_ratio,
                unprunable=graph.unprunable,
                ties=graph.ties,
                whole_heads=graph.whole_heads,
            )

        if settings.allocation == "curve":
            return self._search(graph, curves, plan)
        widths = allocate(
            graph.groups,
            graph.cost,
            settings.budget,
            group_weights(settings.allocation, by_group),
            max_prune_ratio=settings.max_prune_ratio,
            round_to=settings.round_to,
        )
        return plan(widths)

    def _search(
        self,
        graph: ModelGraph,
        curves: Mapping[str, Curve],
        plan: Callable[[Mapping[str, int]], PruningPlan],
    ) -> PruningPlan:
        """Allocate by curves, and take the best of the models really pruned."""
        settings, splits = self.settings, self.splits
        plans = [
            plan(widths)
            for widths in candidate_widths(
                graph,
                settings.budget,
                curves,
                max_prune_ratio=settings.max_prune_ratio,
                round_to=settings.round_to,
            )
        ]
        self.journal.stage(f"attacking {len(plans)} candidates")
        few, many = SEARCH_IMAGES
        n = max(few, min(many, self._image_passes() // (PASSES * len(plans))))
        images, labels = (part[:n] for part in self._calibration)

        def repair_(pruned: nn.Module, plan: PruningPlan) -> None:
            if self.reconstruction is not None:
                self.reconstruction.apply_(pruned, kept_rows(graph, plan))
            if splits is not None:
                batches = splits.train.batches(64, seed=settings.seed, limit=2 * len(labels))
                recalibrate_batchnorm_(pruned, batches)

        best, losses = best_composed(
            graph,
            plans,
            images,
            labels,
            threat=settings.threat,
            seed=settings.seed,
            batch_size=min(64, settings.batch_size),
            repair_=repair_,
        )
        self.journal.parts["search"] = {
            "attack": f"PGD-{STEPS}",
            "images": len(labels),
            "chosen": best,
            "candidates": [
                {
                    "loss": loss,
                    "params": p.pruned.params,
                    "widths": [g.keep_width for g in p.groups],
                }
                for loss, p in zip(losses, plans, strict=True)
            ],
        }
        return plans[best]

    def _calibration_count(self, *, quiet: bool = False) -> int:
        """How many images to measure on: what was asked, else what a CPU can do in minutes."""
        asked = self.settings.calibration_images
        if asked is not None or self.device.type != "cpu":
            return asked or CALIBRATION_IMAGES
        # PGD-10 and one more pass, forward and backward
        work = 3 * 11 * max(self.graph.cost().macs, 1)
        least, macs = (64, CPU_MACS) if self.splits is not None else (32, CPU_MACS // 5)
        n = max(least, min(CALIBRATION_IMAGES, macs // work))
        if n < CALIBRATION_IMAGES and not quiet:
            self.journal.note(
                f"sensitivity is measured on {n} images, not {CALIBRATION_IMAGES}, so that it "
                "ends in minutes on a CPU; --calibration-images takes another number"
            )
        return n

    def _image_passes(self) -> int:
        """How many images times forward passes curves, and the search, may each take."""
        if self.device.type != "cpu":
            return IMAGE_PASSES
        macs = CPU_MACS if self.splits is not None else CPU_MACS // 10
        return min(IMAGE_PASSES, macs // max(self.graph.cost().macs, 1))


def graph_of(model: nn.Module, input_size: tuple[int, int, int], settings: Settings) -> ModelGraph:
    """Return which channels of the model go together under these settings."""
    plan = settings.plan
    return ModelGraph(
        model,
        input_size,
        protect=settings.protect,
        min_width=settings.min_width,
        ties=plan.ties if plan else (),
        whole_heads=plan.whole_heads if plan else settings.whole_heads,
    )


def step_settings(settings: Settings, left: float, step: int) -> Settings | None:
    """Return the settings of one of several pruning steps, None where nothing is left to prune.

    What is left of the budget's target falls by the same factor in every step, and so does the
    least that a group may keep.

    Args:
        settings: of the whole; their budget says what is left after the last step.
        left: share of the dense model's target that the step starts from.
        step: from 1.
    """
    if settings.prune_steps == 1:
        return settings
    share = (1 - settings.budget.prune_ratio) ** (step / settings.prune_steps)
    if share >= left:
        return None
    return replace(
        settings,
        budget=replace(settings.budget, prune_ratio=1 - share / left),
        max_prune_ratio=1 - (1 - settings.max_prune_ratio) ** (1 / settings.prune_steps),
    )
