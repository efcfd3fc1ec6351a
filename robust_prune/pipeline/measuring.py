"""What is measured on a model before its plan: attacks, channel scores, curves and MRS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robust_prune.adversaries import AdversarialSet, adversarial_set, quick
from robust_prune.criteria import (
    MOST_IMAGES,
    block_rises,
    branch_means,
    calibration_images,
    channel_scores,
    measure_mrs,
    structural_curves,
)
from robust_prune.data import DataSplits, stand_ins
from robust_prune.graph import ModelGraph, is_large
from robust_prune.latency import LatencyModel
from robust_prune.modules import device_of, gives_probabilities
from robust_prune.pipeline.effort import Effort, effort_with_data, effort_with_stand_ins
from robust_prune.pipeline.grade import grade_of
from robust_prune.pipeline.job import Job
from robust_prune.pipeline.journal import Journal
from robust_prune.pipeline.settings import CALIBRATION_IMAGES, Settings
from robust_prune.pipeline.stored import Stored, key_of, store, stored
from robust_prune.pipeline.timing import latency_of
from robust_prune.registry import ALLOCATIONS
from robust_prune.repair import Reconstruction, Repaired
from robust_prune.types import Curve, PruningPlan, Sensitivity

Size = tuple[int, int, int]
FEWEST_JUDGED = 200  # held-out images that the plan must not see where a drop is measured on them


@dataclass(frozen=True)
class Observed:
    """A model that is to be pruned, and what it does on calibration images.

    Attributes:
        graph: which channels go together, and what they cost.
        splits: the data, or stand-ins for them.
        effort: what planning may spend.
        images: [N, C, H, W] in [0, 1], clean.
        labels: [N].
        adversarial: the same images, attacked.
        reconstruction: what its layers give, for fitting the pruned ones; None where it is not
            asked for.
        branches: by block that goes whole, the mean [C] of what its branch adds.
        repaired: by digest of its plan, the candidate that won, so that it is not fitted twice.
        key: what a stored measurement must agree with; None where none is asked for.
        stored: what was measured before.
        latency: what the model takes as a function of its widths, where the budget is about that.
    """

    graph: ModelGraph
    splits: DataSplits
    effort: Effort
    images: Tensor
    labels: Tensor
    adversarial: AdversarialSet
    reconstruction: Reconstruction | None
    branches: dict[str, Tensor] = field(default_factory=dict)
    repaired: dict[str, Repaired] = field(default_factory=dict)
    key: Mapping[str, Any] | None = None
    stored: Stored | None = None
    latency: LatencyModel | None = None


@dataclass(frozen=True)
class Measured:
    """What a plan is made of: channel scores [units] and curves, by group, and MRS.

    A plan that is replayed needs no scores, and only allocation by curves needs those. `blocks` are
    loss rises by the groups of residual blocks that may go whole.
    """

    scores: Mapping[str, Tensor]
    curves: Mapping[str, Curve]
    sensitivity: Sensitivity
    blocks: Mapping[tuple[str, ...], float] = field(default_factory=dict)


def graph_of(model: nn.Module, input_size: tuple[int, int, int], settings: Settings) -> ModelGraph:
    """Return which channels of the model go together under these settings."""
    plan = settings.plan
    return ModelGraph(
        model,
        input_size,
        protect=settings.protect,
        only=settings.only,
        min_width=settings.min_width,
        ties=plan.ties if plan else (),
        whole_heads=plan.whole_heads if plan else settings.whole_heads,
    )


def observe(job: Job, graph: ModelGraph, settings: Settings, *, quiet: bool = False) -> Observed:
    """Attack the model on calibration images, and note what its layers give.

    Args:
        job: the run.
        graph: of the model as it is.
        settings: of this pruning step.
        quiet: do not note again how many images there are.
    """
    model, journal = graph.model, job.journal
    latency = latency_of(job, graph, settings)
    effort = effort_of(settings, graph, job.input_size, with_data=job.splits is not None)
    splits = job.splits
    if splits is None:
        with journal.timed("stand-ins"):
            splits = stand_ins(model, job.input_size, 2 * effort.clean, settings.seed)
    journal.tell(calibration=grade_of(splits, job.settings.budget.prune_ratio))
    with journal.timed("adversarial set"):
        journal.stage(f"adversarial set: PGD-{effort.attack_steps}, {settings.threat}")
        spare = 0 if settings.max_drop is None else FEWEST_JUDGED
        images, labels = calibration_images(model, splits, effort.images, settings.seed, spare)
        if not quiet:
            _note_images(journal, model, images, effort)
        key, before = _measured_before(journal, graph, settings, effort, images, labels)
        adversarial = _attacked(model, settings, effort, images, labels, before)
    reconstruction = _reconstruction(journal, splits, effort, model, adversarial, settings)
    return Observed(
        graph,
        splits,
        effort,
        images,
        labels,
        adversarial,
        reconstruction,
        key=key,
        stored=before,
        latency=latency,
    )


def _note_images(journal: Journal, model: nn.Module, images: Tensor, effort: Effort) -> None:
    """Note what is not as asked for with the images, or with what the model gives for them."""
    if effort.cut_short:
        journal.note(
            f"sensitivity is measured on {effort.images} images, not {CALIBRATION_IMAGES}, so "
            "that it ends in minutes on a CPU; --calibration-images takes another number"
        )
    if len(images) < effort.images:
        journal.note(
            f"sensitivity is measured on {len(images)} images, not {effort.images}: there are no "
            "more to take"
        )
    if gives_probabilities(model, images):
        journal.note(
            "the model seems to give probabilities; attacks and losses take logits: leave its "
            "softmax out"
        )


def _measured_before(
    journal: Journal,
    graph: ModelGraph,
    settings: Settings,
    effort: Effort,
    images: Tensor,
    labels: Tensor,
) -> tuple[Mapping[str, Any] | None, Stored | None]:
    """Return what a stored measurement must agree with, and the one that is there."""
    if settings.measured is None:
        return None, None
    key = key_of(graph, settings, effort, images, labels)
    before = stored(settings.measured, key, graph, images)
    if before is not None:
        journal.stage(f"measured before: {settings.measured}")
    return key, before


def _attacked(
    model: nn.Module,
    settings: Settings,
    effort: Effort,
    images: Tensor,
    labels: Tensor,
    before: Stored | None,
) -> AdversarialSet:
    """Attack the images, or take what a measurement before has made of them."""
    batch_size = min(effort.batch_size, settings.batch_size)
    if before is not None:
        name, labels = f"PGD-{effort.attack_steps}", labels.to(before.adversarial.device)
        return AdversarialSet(
            before.adversarial, labels, settings.threat, name, settings.seed, batch_size
        )
    return adversarial_set(
        quick(model, images) if effort.stand_in else model,
        images,
        labels,
        threat=settings.threat,
        steps=effort.attack_steps,
        step_size=effort.step_share * settings.threat.eps,
        seed=settings.seed,
        batch_size=batch_size,
    )


def measure(job: Job, observed: Observed, settings: Settings) -> Measured:
    """Score the channels, and measure the curves and MRS that the plan is made by."""
    graph, adversarial, journal = observed.graph, observed.adversarial, job.journal
    model = graph.model
    if observed.stored is not None:
        before = observed.stored
        if before.curves:
            journal.tell(curves=tuple(before.curves.values()))
        blocks = _blocks(observed, settings, journal)
        return Measured(before.scores, before.curves, before.sensitivity, blocks)
    scores: Mapping[str, Tensor] = {}
    curves: Mapping[str, Curve] = {}
    if settings.plan is None:
        with journal.timed("scores"):
            scores = channel_scores(model, graph, score=settings.score, adversarial=adversarial)
        if ALLOCATIONS.fact(settings.allocation, "curves"):
            journal.stage(f"curves of {len(graph.groups)} groups")
            effort = observed.effort
            with journal.timed("curves"):
                curves = structural_curves(
                    model,
                    graph,
                    scores,
                    adversarial,
                    passes=effort.passes,
                    fewest=effort.fewest,
                    quick=True,
                    without_largest=not observed.splits.in_distribution,
                )
            journal.tell(curves=tuple(curves.values()))
    blocks = _blocks(observed, settings, journal)
    with journal.timed("sensitivity"):
        journal.stage(f"module robustness sensitivity: {settings.estimator}")
        sensitivity = measure_mrs(graph, adversarial, settings.estimator, scores)
    if observed.key is not None and settings.measured is not None:
        store(settings.measured, observed.key, adversarial, scores, curves, sensitivity)
    return Measured(scores, curves, sensitivity, blocks)


def _blocks(
    observed: Observed, settings: Settings, journal: Journal
) -> dict[tuple[str, ...], float]:
    """Measure what residual blocks are worth as a whole, where they may go."""
    graph = observed.graph
    if not settings.whole_blocks or settings.plan is not None:
        return {}
    with journal.timed("blocks"):
        if not graph.blocks:
            if settings.blocks:
                journal.note("--blocks: no residual block of this model can go whole")
            return {}
        journal.stage(f"loss without each of {len(graph.blocks)} blocks")
        rises = block_rises(graph.model, graph.blocks, observed.adversarial, observed.effort.passes)
    journal.tell(blocks=rises)
    return {block.groups: rises[block.name] for block in graph.blocks}


def note_branches(observed: Observed, plan: PruningPlan) -> None:
    """Note what the branches add that a plan takes away; before the model is cut."""
    graph, fitted = observed.graph, observed.reconstruction
    empty = graph.empty_blocks(plan.widths)
    new = [block for block in empty if block.name not in observed.branches]
    if new:
        images = observed.adversarial.images if fitted is None else fitted.images
        observed.branches.update(branch_means(graph.model, new, images[:MOST_IMAGES]))


def effort_of(
    settings: Settings, graph: ModelGraph, input_size: Size, *, with_data: bool
) -> Effort:
    """Return what planning may spend on this model."""
    asked, macs = settings.calibration_images, graph.cost().macs
    if not with_data:
        return effort_with_stand_ins(asked, macs, input_size[1] * input_size[2])
    on_cpu = device_of(graph.model).type == "cpu"
    return effort_with_data(asked, macs, on_cpu, is_large(graph.model))


def _reconstruction(
    journal: Journal,
    splits: DataSplits,
    effort: Effort,
    model: nn.Module,
    adversarial: AdversarialSet,
    settings: Settings,
) -> Reconstruction | None:
    """Note what the layers give on adversarial images and on as many clean ones."""
    if not settings.reconstruct:
        return None
    with journal.timed("reconstruction"):
        known = splits.in_distribution
        n = len(adversarial) if known else effort.clean
        few = min(n, len(splits.train))
        clean, _ = splits.train.take(few, settings.seed + 1, verdicts=False)
        clean = clean.to(device_of(model))
        pairs = zip(adversarial.images, clean, strict=False)
        more = clean[len(adversarial) :]
        images = torch.stack([*(image for pair in pairs for image in pair), *more])
        return (
            Reconstruction.of(model, images)
            if known
            else Reconstruction.of_stand_ins(model, images)
        )
