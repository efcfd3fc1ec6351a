"""What is measured on a model before its plan: attacks, channel scores, curves and MRS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_prune.adversaries import AdversarialSet, adversarial_set
from robust_prune.criteria import (
    IMAGE_PASSES,
    calibration_images,
    channel_scores,
    measure_mrs,
    structural_curves,
)
from robust_prune.graph import ModelGraph
from robust_prune.modules import device_of
from robust_prune.pipeline.job import Job
from robust_prune.pipeline.settings import CALIBRATION_IMAGES, Settings
from robust_prune.registry import ALLOCATIONS
from robust_prune.repair import Reconstruction
from robust_prune.types import Curve, Sensitivity

CPU_MACS = 10**13  # some minutes of a few cores


@dataclass(frozen=True)
class Observed:
    """A model that is to be pruned, and what it does on calibration images.

    Attributes:
        graph: which channels go together, and what they cost.
        images: [N, C, H, W] in [0, 1], clean.
        labels: [N].
        adversarial: the same images, attacked.
        reconstruction: what its layers give, for fitting the pruned ones; None where it is not
            asked for.
    """

    graph: ModelGraph
    images: Tensor
    labels: Tensor
    adversarial: AdversarialSet
    reconstruction: Reconstruction | None


@dataclass(frozen=True)
class Measured:
    """What a plan is made of: channel scores [units] and curves, by group, and MRS.

    A plan that is replayed needs no scores, and only allocation by curves needs those.
    """

    scores: Mapping[str, Tensor]
    curves: Mapping[str, Curve]
    sensitivity: Sensitivity


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


def observe(job: Job, graph: ModelGraph, settings: Settings, *, quiet: bool = False) -> Observed:
    """Attack the model on calibration images, and note what its layers give.

    Args:
        job: the run.
        graph: of the model as it is.
        settings: of this pruning step.
        quiet: do not note again how many images there are.
    """
    model, journal = graph.model, job.journal
    with journal.timed("adversarial set"):
        journal.stage(f"adversarial set: PGD-10, {settings.threat}")
        n = _calibration_count(job, graph, settings, quiet=quiet)
        images, labels = calibration_images(model, job.splits, job.input_size, n, settings.seed)
        adversarial = adversarial_set(
            model,
            images,
            labels,
            threat=settings.threat,
            seed=settings.seed,
            batch_size=min(64, settings.batch_size),
        )
    reconstruction = _reconstruction(job, model, adversarial, settings)
    return Observed(graph, images, labels, adversarial, reconstruction)


def measure(job: Job, observed: Observed, settings: Settings) -> Measured:
    """Score the channels, and measure the curves and MRS that the plan is made by."""
    graph, adversarial, journal = observed.graph, observed.adversarial, job.journal
    model = graph.model
    scores: Mapping[str, Tensor] = {}
    curves: Mapping[str, Curve] = {}
    if settings.plan is None:
        with journal.timed("scores"):
            scores = channel_scores(model, graph, score=settings.score, adversarial=adversarial)
        if ALLOCATIONS.fact(settings.allocation, "curves"):
            journal.stage(f"curves of {len(graph.groups)} groups")
            passes = image_passes(job, graph)
            with journal.timed("curves"):
                curves = structural_curves(model, graph, scores, adversarial, passes=passes)
            journal.tell(curves=tuple(curves.values()))
    with journal.timed("sensitivity"):
        journal.stage(f"module robustness sensitivity: {settings.estimator}")
        sensitivity = measure_mrs(graph, adversarial, settings.estimator, scores)
    return Measured(scores, curves, sensitivity)


def image_passes(job: Job, graph: ModelGraph) -> int:
    """Return how many images times forward passes curves, and the search, may each take."""
    if device_of(graph.model).type != "cpu":
        return IMAGE_PASSES
    macs = CPU_MACS if job.splits is not None else CPU_MACS // 10
    return min(IMAGE_PASSES, macs // max(graph.cost().macs, 1))


def _calibration_count(job: Job, graph: ModelGraph, settings: Settings, *, quiet: bool) -> int:
    """How many images to measure on: what was asked, else what a CPU can do in minutes."""
    asked = settings.calibration_images
    if asked is not None or device_of(graph.model).type != "cpu":
        return asked or CALIBRATION_IMAGES
    # PGD-10 and one more pass, forward and backward
    work = 3 * 11 * max(graph.cost().macs, 1)
    least, macs = (64, CPU_MACS) if job.splits is not None else (32, CPU_MACS // 5)
    n = max(least, min(CALIBRATION_IMAGES, macs // work))
    if n < CALIBRATION_IMAGES and not quiet:
        job.journal.note(
            f"sensitivity is measured on {n} images, not {CALIBRATION_IMAGES}, so that it ends in "
            "minutes on a CPU; --calibration-images takes another number"
        )
    return n


def _reconstruction(
    job: Job, model: nn.Module, adversarial: AdversarialSet, settings: Settings
) -> Reconstruction | None:
    """Note what the layers give on adversarial images and on as many clean ones."""
    if job.splits is None or not settings.reconstruct:
        return None
    with job.journal.timed("reconstruction"):
        train = job.splits.train
        clean, _ = train.take(min(len(adversarial), len(train)), settings.seed + 1)
        pairs = zip(adversarial.images, clean.to(device_of(model)), strict=False)
        images = torch.stack([image for pair in pairs for image in pair])
        return Reconstruction.of(model, images)
