"""What Python code calls: a model compressed, and its sensitivity measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from robust_prune.adversaries import adversarial_set
from robust_prune.criteria import RHO, Estimator, Score, calibration_images, measure_mrs
from robust_prune.data import open_for
from robust_prune.distributed import processes
from robust_prune.errors import RunError
from robust_prune.evaluation import Attack
from robust_prune.finetune import Method
from robust_prune.graph import ModelGraph
from robust_prune.models import image_size_of
from robust_prune.modules import check_float32, contiguous
from robust_prune.pipeline.compression import run
from robust_prune.pipeline.describing import asked
from robust_prune.pipeline.run_folder import RunFolder
from robust_prune.pipeline.settings import CALIBRATION_IMAGES, LINF_8, CompressResult, Settings
from robust_prune.types import Budget, PruningPlan, Sensitivity, Target, ThreatModel


def compress(
    model: nn.Module,
    data: Any,
    *,
    prune_ratio: float = 0.5,
    target: Target = "macs",
    threat: ThreatModel = LINF_8,
    allocation: str = "curve",
    score: Score = "l2",
    finetune: str | Method | None = None,
    epochs: int = 0,
    protect: Sequence[str] = (),
    seed: int = 0,
    test: Any = None,
    evaluation: Attack = "none",
    n_eval: int = 200,
    plan: PruningPlan | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
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
        finetune: `trades`, `pgd-at`, `n-fgsm`, `mart`, `rslad`, `ard`, one of them with `+awp`,
            `package.module:function`, or a function (model, images, labels, attack) -> loss; None
            for no fine-tuning.
        epochs: of fine-tuning, in all.
        protect: dotted layer names or patterns that stay whole.
        seed: of everything random.
        test: images to measure on, where `data` has no test split of its own.
        evaluation: `none`, `pgd` or `autoattack`.
        n_eval: test images to measure on.
        plan: replay this plan instead of making one; its budget and rules then count.
        run_dir: folder to keep the run's state in; deleted first unless `resume`.
        resume: go on with the run in `run_dir`; on a CPU to what it would have been, bit for bit.
        more: further fields of `Settings`: `steps` prunes in several, `training_options` are
            fields of `TrainingConfig`.

    Returns:
        `model` (of the caller's class, in eval mode), `plan`, and `report` as plain data.

    Raises:
        BudgetError: the budget is out of reach; the message says what is possible.
        DataError: the data can't be read or does not fit the model.
        ModelError: the model's weights are not float32.
        RunError: `resume`, and there is no run in `run_dir`, or one with other settings.
    """
    check_float32(model)
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
    splits = open_for(model, data, test=test, input_size=settings.input_size)
    folder = None if run_dir is None else RunFolder(run_dir)
    all_processes = processes()
    if folder is not None and all_processes.first:
        if not resume and folder.exists() and not folder.complete:
            raise RunError(
                f"{folder.path} holds a run that is not complete; resume=True goes on with it, "
                "or delete it"
            )
        folder.open(asked(model, splits, settings, all_processes), resume=resume)
    result = run(model, splits, settings, folder=folder, processes=all_processes)
    if folder is not None and all_processes.first:
        folder.close()
    return result


def sensitivity(
    model: nn.Module,
    source: Any,
    *,
    threat: ThreatModel = LINF_8,
    method: Estimator = "first-order",
    rho: float = RHO,
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
    check_float32(model)
    model = contiguous(model)
    splits = open_for(model, source, input_size=input_size)
    size = image_size_of(model, splits.input_size if splits else input_size)
    graph = ModelGraph(model, size, protect=protect)
    images, labels = calibration_images(model, splits, size, n, seed)
    adversarial = adversarial_set(model, images, labels, threat=threat, seed=seed, batch_size=64)
    return measure_mrs(graph, adversarial, method, rho=rho, on_module=on_module)
