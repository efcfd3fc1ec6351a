"""The functions that people call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from robust_prune.adversaries import adversarial_set
from robust_prune.criteria import calibration_images, measure_mrs
from robust_prune.data import open_for, stand_ins
from robust_prune.distributed import processes
from robust_prune.errors import RunError, UsageError
from robust_prune.graph import ModelGraph
from robust_prune.models import image_size_of
from robust_prune.modules import check_float32, contiguous, device_of
from robust_prune.options import (
    FINE_TUNING_EPOCHS,
    BudgetOptions,
    EvaluationOptions,
    FineTuningOptions,
    LatencyOptions,
    PlanningOptions,
    RunOptions,
    SensitivityOptions,
    stated,
    takes,
)
from robust_prune.pipeline.compression import run
from robust_prune.pipeline.describing import asked
from robust_prune.pipeline.holding import held_for_all
from robust_prune.pipeline.run_folder import RunFolder
from robust_prune.pipeline.settings import (
    LINF_8,
    CompressResult,
    Settings,
    budget_of,
    eval_images,
    learning_rate,
)
from robust_prune.types import PruningPlan, Sensitivity, ThreatModel

BUDGET = tuple(stated(BudgetOptions))
REPEATED = ("protect", "only", "ratio_of", "also")  # several texts, or one; shares by name


@takes(
    BudgetOptions,
    PlanningOptions,
    LatencyOptions,
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
        options: those of the budget (`prune_ratio` or `max_drop`, `target`), of planning
            (`allocation`, `score`, `protect`, `ratio_of={"layer3.*": 0.7}` and more), of
            fine-tuning (`finetune`, a method's name or a function (model, images, labels, attack)
            -> loss, `epochs`, `lr` and more; no method means none) and of the evaluation
            (`evaluation`, `n_eval`); `robust_prune.options` says all of them.

    Returns:
        `model` (of the caller's class, in eval mode), `plan`, and `report` as plain data.

    Raises:
        BudgetError: the budget is out of reach; the message says what is possible.
        DataError: the data can't be read or does not fit the model.
        ModelError: the model's weights are not float32.
        RunError: `resume`, and there is no run in `run_dir`, or one with other settings; or another
            run is at work there.
        UsageError: an option is not known, or has a value that it can't have.
    """
    check_float32(model)
    if resume and run_dir is None:
        raise UsageError("resume=True goes on with the run in a folder; name it with run_dir")
    if options.get("max_drop") is not None and "prune_ratio" in options:
        raise UsageError("prune_ratio and max_drop: one of them says how much goes; leave one out")
    budget = BudgetOptions(**{n: options.pop(n) for n in BUDGET if n in options})
    options |= {name: _entries(options[name]) for name in REPEATED if name in options}
    if options.get("finetune") == "none":  # as the command line has it
        options["finetune"] = None
    if options.get("finetune") is not None:
        options.setdefault("epochs", FINE_TUNING_EPOCHS)
    if options.get("measured") is not None:
        options["measured"] = Path(options["measured"])
    options["lr"] = learning_rate(options.get("lr"), model)
    options["n_eval"] = eval_images(options.get("n_eval"), device_of(model))
    settings = Settings(
        **(budget_of(budget) if plan is None else {"budget": plan.budget}),
        threat=threat,
        plan=plan,
        input_size=input_size,
        seed=seed,
        **options,
    )
    splits = open_for(model, data, test=test, input_size=settings.input_size)
    if splits is not None and not isinstance(data, (str, os.PathLike)):
        _check_size(input_size, splits.input_size)
    folder = None if run_dir is None else RunFolder(run_dir)
    all_processes = processes()

    def begin(folder: RunFolder) -> None:
        if not resume and folder.exists() and not folder.complete:
            raise RunError(
                f"{folder.path} holds a run that is not complete; resume=True goes on with it, "
                "or delete it"
            )
        folder.open(asked(model, splits, settings, all_processes), resume=resume)

    with held_for_all(folder, all_processes, begin):
        result = run(model, splits, settings, folder=folder, processes=all_processes)
        if folder is not None and all_processes.first:
            folder.close()
    return result


def _check_size(asked: tuple[int, int, int] | None, images: tuple[int, int, int]) -> None:
    """Raise where a caller's images have another size than is asked for."""
    if asked is not None and tuple(asked) != tuple(images):
        raise UsageError(
            f"input_size {tuple(asked)} is not that of the images, {tuple(images)}; leave it out, "
            "or resize them"
        )


def _entries(value: Any) -> tuple[str, ...]:
    """Return what may be repeated as the command line has it; a mapping gives NAME=SHARE."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Mapping):
        return tuple(f"{name}={share!r}" for name, share in value.items())
    return tuple(value)


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
    """Measure MRS of every layer and channel group, as `robust_prune.criteria.mrs` defines it.

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
    ThreatModel.checked(threat)
    model = contiguous(model)
    splits = open_for(model, source, input_size=input_size)
    size = image_size_of(model, splits.input_size if splits else input_size)
    graph = ModelGraph(model, size, protect=protect)
    splits = splits or stand_ins(model, size, n, seed)
    images, labels = calibration_images(model, splits, n, seed)
    adversarial = adversarial_set(model, images, labels, threat=threat, seed=seed, batch_size=64)
    return measure_mrs(graph, adversarial, estimator, rho=rho, on_module=on_module)
