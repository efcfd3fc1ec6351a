"""The whole way, station by station: the only file that composes the stages."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_prune import builders, models, mrs, report, scores
from robust_prune.checkpoint import write_text
from robust_prune.curves import measure_mrs
from robust_prune.data import DataSplits, open_for
from robust_prune.errors import DataError, Interrupted, UsageError
from robust_prune.evaluation import Attack
from robust_prune.finetune import Method
from robust_prune.finetune.loop import History, TrainingConfig, train_
from robust_prune.graph import ModelGraph
from robust_prune.modules import (
    contiguous,
    seeded,
)
from robust_prune.settings import CALIBRATION_IMAGES, LINF_8, CompressResult, Events, Settings
from robust_prune.stations import Compression, calibration_images, image_size_of
from robust_prune.types import (
    Budget,
    ModelSpec,
    PruningPlan,
    Sensitivity,
    Target,
    ThreatModel,
)


def compress(
    model: nn.Module,
    data: Any,
    *,
    prune_ratio: float = 0.5,
    target: Target = "macs",
    threat: ThreatModel = LINF_8,
    allocation: str = "curve",
    score: scores.Score = "l2",
    finetune: str | Method | None = None,
    epochs: int = 0,
    protect: Sequence[str] = (),
    seed: int = 0,
    test: Any = None,
    evaluation: Attack = "none",
    n_eval: int = 200,
    plan: PruningPlan | None = None,
    **more: Any,
) -> CompressResult:
    """Prune a model to a budget with the least loss of robustness, and fine-tune it.

    Args:
        model: any module that takes images in [0, 1], [N, C, H, W], and gives logits [N, K]; it
            is copied, the caller's stays untouched.
        data: a data set name or folder, a DataLoader, or an iterable of (images, labels), of
            training images; None calibrates on synthetic images.
        prune_ratio: share of `target` to remove, in (0, 1).
        target: `macs`, `params` or `channels`.
        threat: norm and eps of the attacks.
        allocation: `curve` (the measured loss of each group), `mrs` (the paper's rule), or the
            controls `inverted` and `uniform`.
        score: `l2`, or `taylor`, `fisher` or `reconstruction` on adversarial images.
        finetune: `trades`, `pgd-at`, `n-fgsm`, `package.module:function`, or a function
            (model, images, labels, attack) -> loss; None for no fine-tuning.
        epochs: of fine-tuning.
        protect: dotted layer names or patterns that stay whole.
        seed: of everything random.
        test: images to measure on, where `data` has no test split of its own.
        evaluation: `none`, `pgd` or `autoattack`.
        n_eval: test images to measure on.
        plan: replay this plan instead of making one; its budget and rules then count.
        more: further fields of `Settings`.

    Returns:
        `model` (of the caller's class, in eval mode), `plan`, and `report` as plain data.

    Raises:
        BudgetError: the budget is out of reach; the message says what is possible.
        DataError: the data can't be read or does not fit the model.
    """
    budget = plan.budget if plan is not None else Budget(target, prune_ratio)
    settings = Settings(
        budget=budget,
        threat=threat,
        allocation=allocation,
        score=score,
        finetune=finetune,
        epochs=epochs,
        protect=tuple(protect),
        seed=seed,
        evaluation=evaluation,
        n_eval=n_eval,
        plan=plan,
        **more,
    )
    return run(model, open_for(model, data, test=test), settings)


def run(
    model: nn.Module,
    splits: DataSplits | None,
    settings: Settings,
    events: Events | None = None,
) -> CompressResult:
    """Do what `settings` say to a copy of `model`; `splits` None means synthetic calibration."""
    events = events or Events()
    with seeded(settings.seed), torch.enable_grad():
        job = Compression(model, splits, settings, events)
        job.measure_and_plan()
        job.prune()
        if settings.finetune is not None:
            job.fine_tune()
        if settings.evaluation != "none":
            job.evaluate()
    return job.result


def sensitivity(
    model: nn.Module,
    source: Any,
    *,
    threat: ThreatModel = LINF_8,
    method: mrs.Method = "first-order",
    rho: float = mrs.RHO,
    n: int = CALIBRATION_IMAGES,
    seed: int = 0,
    protect: Sequence[str] = (),
    input_size: tuple[int, int, int] | None = None,
    on_module: Callable[[str], None] | None = None,
) -> Sensitivity:
    """Measure MRS of every layer and channel group; see `robust_prune.mrs` for the definition.

    Args:
        model: takes images in [0, 1]; left as it was.
        source: a data set name or folder, a loader, or an iterable of (images, labels); training
            images, never test images.
        threat: norm and eps of the PGD-10 that makes the adversarial set.
        method: `first-order` (one pass for all layers), `ascent` (the reference), or `structural`
            (what pruning does: the rise when half of a group is masked, by group alone).
        rho: radius of the disturbance relative to each layer's weight norm.
        n: images to measure on.
        seed: of the draw and the attack.
        protect: layers that no group may touch.
        input_size: (channels, height, width), where neither model nor data tell.
        on_module: called with each layer's name when its ascent is done.
    """
    model = contiguous(model)
    splits = open_for(model, source)
    size = image_size_of(model, splits, input_size)
    graph = ModelGraph(model, size, protect=protect)
    images, labels = calibration_images(model, splits, size, n, seed)
    adversarial = mrs.adversarial_set(
        model, images, labels, threat=threat, seed=seed, batch_size=64
    )
    return measure_mrs(graph, adversarial, method, rho=rho, on_module=on_module)


def train_model(
    spec: ModelSpec,
    splits: DataSplits,
    config: TrainingConfig,
    *,
    device: torch.device | str = "cpu",
    pretrained: bool = False,
    start: nn.Module | None = None,
    events: Events | None = None,
) -> tuple[nn.Module, History]:
    """Train a network adversarially, from `start` or from the builder's weights."""
    events = events or Events()
    if start is None:
        with seeded(config.seed):
            start = builders.create(spec, pretrained=pretrained)
    model = start.to(device)
    if splits.validation is None:
        raise DataError("too few images to keep some back for validation")
    history = train_(
        model,
        splits.train,
        splits.validation,
        config,
        on_progress=events.training,
        on_epoch=events.epoch,
    )
    return model, history


def compress_file(
    model: nn.Module,
    splits: DataSplits | None,
    settings: Settings,
    folder: Path,
    name: str,
    events: Events,
) -> tuple[CompressResult, dict[str, Path]]:
    """Compress and write `<name>.safetensors`, `report.json` and `report.html` into `folder`.

    The model is written as soon as it is pruned, again when it is fine-tuned, and completed after
    the evaluation, each time whole or not at all.

    Raises:
        Interrupted: the user stopped the run; the message says which file is there.
    """
    paths = {
        "model": folder / f"{name}.safetensors",
        "report": folder / "report.json",
        "html": folder / "report.html",
    }
    made = not folder.exists()
    written: list[str] = []

    def write(result: CompressResult) -> None:
        text, page = report.to_json(result.report), report.to_html(result.report)
        models.save(result.model, paths["model"], result.report)
        written.append(result.report["status"])
        write_text(paths["report"], text)
        write_text(paths["html"], page)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror}; name another folder") from None
    try:
        result = run(model, splits, settings, replace(events, saveable=write))
    except KeyboardInterrupt:
        if not written:
            raise Interrupted("stopped before anything was pruned; no file was written") from None
        raise Interrupted(
            f"stopped; {paths['model']} is complete and usable, its status is {written[-1]!r}"
        ) from None
    finally:
        if made and not written and folder.exists():
            with contextlib.suppress(OSError):
                folder.rmdir()
    return result, paths
