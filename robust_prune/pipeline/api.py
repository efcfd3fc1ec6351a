"""The whole way, station by station: the only file that composes the stages."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_prune import report
from robust_prune.adversaries import adversarial_set
from robust_prune.criteria import calibration_images, measure_mrs
from robust_prune.data import DataSplits, open_for
from robust_prune.distributed import ALONE, Processes, processes
from robust_prune.errors import DataError, Interrupted, RunError, UsageError
from robust_prune.files import write_text
from robust_prune.finetune import EpochRecord, History, TrainingConfig, train_
from robust_prune.graph import ModelGraph
from robust_prune.models import build_model, image_size_of, save
from robust_prune.modules import check_float32, contiguous, device_of, seeded
from robust_prune.options import (
    FINE_TUNING_EPOCHS,
    BudgetOptions,
    EvaluationOptions,
    FineTuningOptions,
    PlanningOptions,
    RunOptions,
    SensitivityOptions,
    takes,
)
from robust_prune.pipeline.compression import Compression
from robust_prune.pipeline.record import plain_settings
from robust_prune.pipeline.run_folder import RunFolder, clear_drafts, fingerprint
from robust_prune.pipeline.settings import (
    LINF_8,
    CompressResult,
    Events,
    Settings,
    eval_images,
)
from robust_prune.types import (
    Budget,
    ModelSpec,
    PruningPlan,
    Sensitivity,
    ThreatModel,
    to_plain,
)

RUN = "run"  # where a result's folder keeps the state of the run


@takes(
    BudgetOptions,
    PlanningOptions,
    FineTuningOptions,
    EvaluationOptions,
    renamed={"method": "estimator", "steps": "prune_steps", "training_options": None},
)
def compress(
    model: nn.Module,
    data: Any,
    *,
    threat: ThreatModel = LINF_8,
    test: Any = None,
    plan: PruningPlan | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    input_size: tuple[int, int, int] | None = None,
    seed: int = RunOptions.seed,
    **options: Any,
) -> CompressResult:
    """Prune a model to a budget with the least loss of robustness, and fine-tune it.

    Args:
        model: any module that takes images in [0, 1], [N, C, H, W], and gives logits [N, K]; it
            is copied, the caller's stays untouched.
        data: a data set name or folder, a DataLoader, or an iterable of (images, labels), of
            training images; None calibrates on synthetic images.
        threat: norm and eps of the attacks.
        test: images to measure on, where `data` has no test split of its own.
        plan: replay this plan instead of making one; its budget and rules then count.
        run_dir: folder to keep the run's state in; deleted first unless `resume`.
        resume: go on with the run in `run_dir`; on a CPU to what it would have been, bit for bit.
        input_size: (channels, height, width), where neither model nor data tell.
        seed: of everything random.
        options: those of the budget (`prune_ratio`, `target`), of planning (`allocation`, `score`,
            `protect` and more), of fine-tuning (`finetune`, a method's name or a function (model,
            images, labels, attack) -> loss, `epochs`, `lr` and more; no method means none) and of
            the evaluation (`evaluation`, `n_eval`); `robust_prune.options` says all of them.

    Returns:
        `model` (of the caller's class, in eval mode), `plan`, and `report` as plain data.

    Raises:
        BudgetError: the budget is out of reach; the message says what is possible.
        DataError: the data can't be read or does not fit the model.
        ModelError: the model's weights are not float32.
        RunError: `resume`, and there is no run in `run_dir`, or one with other settings.
        UsageError: an option is not known, or has a value that it can't have.
    """
    check_float32(model)
    budget = BudgetOptions(**{n: options.pop(n) for n in ("prune_ratio", "target") if n in options})
    options["protect"] = tuple(options.get("protect", ()))
    if options.get("finetune") is not None:
        options.setdefault("epochs", FINE_TUNING_EPOCHS)
    options["n_eval"] = eval_images(options.get("n_eval"), device_of(model))
    settings = Settings(
        budget=Budget(budget.target, budget.prune_ratio) if plan is None else plan.budget,
        threat=threat,
        plan=plan,
        input_size=input_size,
        seed=seed,
        **options,
    )
    splits = open_for(model, data, test=test, input_size=settings.input_size)
    folder = None if run_dir is None else RunFolder(run_dir)
    all_processes = processes()
    if folder is not None and all_processes.first:
        if not resume and folder.exists() and not folder.complete:
            raise RunError(
                f"{folder.path} holds a run that is not complete; resume=True goes on with it, "
                "or delete it"
            )
        _open_run(folder, asked(model, splits, settings, all_processes), resume)
    result = run(model, splits, settings, folder=folder, processes=all_processes)
    if folder is not None and all_processes.first:
        folder.close()
    return result


def run(
    model: nn.Module,
    splits: DataSplits | None,
    settings: Settings,
    events: Events | None = None,
    *,
    folder: RunFolder | None = None,
    processes: Processes = ALONE,
) -> CompressResult:
    """Do what `settings` say to a copy of `model`; `splits` None means synthetic calibration."""
    with seeded(settings.seed), torch.enable_grad():
        job = Compression(model, splits, settings, events or Events(), folder, processes)
        for step in range(1, settings.prune_steps + 1):
            job.prune(step)
            if settings.finetune is not None:
                job.fine_tune(step)
        if settings.evaluation != "none":
            job.evaluate()
    return job.result


def asked(
    model: nn.Module, splits: DataSplits | None, settings: Settings, processes: Processes = ALONE
) -> dict[str, Any]:
    """Return what a run is asked, as plain data: all that its result depends on."""
    plan = settings.plan
    return {
        "model": fingerprint(model),
        "processes": processes.size,
        "data": None if splits is None else splits.described(),
        "settings": to_plain(plain_settings(settings)),
        "plan": plan.digest if plan else None,
    }


def _open_run(folder: RunFolder, config: dict[str, Any], resume: bool) -> None:
    if resume:
        folder.go_on(config)
    else:
        folder.begin(config)


@takes(renamed={"method": "estimator"})
def sensitivity(
    model: nn.Module,
    source: Any,
    *,
    threat: ThreatModel = LINF_8,
    estimator: str = SensitivityOptions.estimator,
    rho: float = SensitivityOptions.rho,
    n: int = SensitivityOptions.images,
    seed: int = RunOptions.seed,
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
        estimator: `first-order` (one pass for all layers), `ascent` (the reference), or
            `structural` (what pruning does: the rise when half of a group is masked).
        rho: radius of the disturbance relative to each layer's weight norm.
        n: images to measure on.
        seed: of the draw and the attack.
        protect: layers that no group may touch.
        input_size: (channels, height, width), where neither model nor data tell.
        on_module: called with each layer's name when its ascent is done.
    """
    check_float32(model)
    model = contiguous(model)
    splits = open_for(model, source, input_size=input_size)
    size = image_size_of(model, splits.input_size if splits else input_size)
    graph = ModelGraph(model, size, protect=protect)
    images, labels = calibration_images(model, splits, size, n, seed)
    adversarial = adversarial_set(model, images, labels, threat=threat, seed=seed, batch_size=64)
    return measure_mrs(graph, adversarial, estimator, rho=rho, on_module=on_module)


def train_model(
    spec: ModelSpec,
    splits: DataSplits,
    config: TrainingConfig,
    *,
    device: torch.device | str = "cpu",
    pretrained: bool = False,
    start: nn.Module | None = None,
    teacher: nn.Module | None = None,
    events: Events | None = None,
    folder: RunFolder | None = None,
    processes: Processes = ALONE,
) -> tuple[nn.Module, History]:
    """Train a network adversarially, from `start` or from the builder's weights.

    With `folder` the state of the run is kept there, and taken up where there is one.
    """
    events = events or Events()
    if start is None:
        with seeded(config.seed):
            start = build_model(spec, pretrained=pretrained)
    model = start.to(device)
    if splits.validation is None:
        raise DataError("too few images to keep some back for validation")

    def on_epoch(record: EpochRecord) -> None:
        if folder is not None and processes.first:
            folder.record("training", to_plain(record))
        if events.epoch is not None:
            events.epoch(record)

    history = train_(
        model,
        splits.train,
        splits.validation,
        config,
        teacher=teacher,
        processes=processes,
        saved=None if folder is None else folder.state("training"),
        on_progress=events.training,
        on_epoch=on_epoch,
    )
    return model, history


def compress_file(
    model: nn.Module,
    splits: DataSplits | None,
    settings: Settings,
    folder: Path,
    name: str,
    events: Events,
    *,
    arguments: Mapping[str, Any] | None = None,
    resume: bool = False,
    processes: Processes = ALONE,
) -> tuple[CompressResult, dict[str, Path]]:
    """Compress and write `<name>.safetensors`, `report.json` and `report.html` into `folder`.

    The model is written as soon as it is pruned, again when it is fine-tuned, and completed after
    the evaluation, each time whole or not at all. Where `arguments` are given, `folder/run` keeps
    the state of the run, and them for whoever goes on with it.

    Raises:
        Interrupted: the user stopped the run; the message says which file is there.
        RunError: `resume`, and the run there is another one.
    """
    check_float32(model)
    paths = {
        "model": folder / f"{name}.safetensors",
        "report": folder / "report.json",
        "html": folder / "report.html",
    }
    written: list[str] = []

    def write(result: CompressResult) -> None:
        if not processes.first:
            return
        text, page = report.to_json(result.report), report.to_html(result.report)
        save(result.model, paths["model"], result.report)
        written.append(result.report["status"])
        write_text(paths["report"], text)
        write_text(paths["html"], page)

    state = None if arguments is None else RunFolder(folder / RUN)
    made = not folder.exists()
    if processes.first:
        _make_folder(folder)
        if state is not None:
            config = asked(model, splits, settings, processes)
            _open_run(state, {**config, "arguments": dict(arguments or {})}, resume)
            clear_drafts(folder)
            if resume and paths["model"].exists():
                written.append("that of the run before")
    try:
        result = run(
            model,
            splits,
            settings,
            replace(events, saveable=write),
            folder=state,
            processes=processes,
        )
    except KeyboardInterrupt:
        if state is None and processes.first and made and not written:
            _forget(folder, None)
        told = (
            f"stopped; {paths['model']} is complete and usable, its status is {written[-1]!r}"
            if written
            else "stopped before anything was pruned; no file was written"
        )
        go_on = "" if state is None else f"; robust-prune compress --resume {folder} goes on"
        raise Interrupted(told + go_on) from None
    except Exception:
        if processes.first and not resume and not written:
            _forget(folder if made else None, state)
        raise
    if processes.first and state is not None:
        state.close()
    return result, paths


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror}; name another folder") from None


def _forget(folder: Path | None, state: RunFolder | None) -> None:
    """Delete the run's state, and the folder where it is empty."""
    if state is not None:
        state.clear()
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.rmdir()
