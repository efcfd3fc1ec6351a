"""The whole way, station by station: the only file that composes the stages."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_prune import allocation as allocating
from robust_prune import calibration, data, evaluation, models, mrs, report, scores
from robust_prune.checkpoint import write_text
from robust_prune.data import DataSplits, open_for
from robust_prune.errors import DataError, Interrupted, UsageError
from robust_prune.evaluation import Attack, TestImages
from robust_prune.finetune import Method, resolve
from robust_prune.finetune.loop import EpochRecord, History, Progress, TrainingConfig, train_
from robust_prune.graph import ModelGraph
from robust_prune.modules import (
    ImageModel,
    check_outputs,
    contiguous,
    device_of,
    image_channels,
    make_contiguous_,
    seeded,
)
from robust_prune.types import (
    Budget,
    Evaluation,
    ModelSpec,
    PruningPlan,
    Sensitivity,
    Target,
    ThreatModel,
    to_plain,
)

log = logging.getLogger(__name__)
CALIBRATION_IMAGES = 512
CPU_MACS = 10**13
BATCHNORM_IMAGES = 2048
LINF_8 = ThreatModel.linf("8/255")


@dataclass(frozen=True)
class Settings:
    """What `compress` is asked to do."""

    budget: Budget = field(default_factory=lambda: Budget("macs", 0.5))
    threat: ThreatModel = LINF_8
    allocation: str = "mrs"
    score: scores.Score = "taylor"
    method: mrs.Method = "first-order"
    finetune: str | Method | None = None
    epochs: int = 0
    lr: float = 0.02
    steps: int = 7
    batch_size: int = 128
    protect: tuple[str, ...] = ()
    min_width: int = 2
    max_prune_ratio: float = allocating.MAX_PRUNE_RATIO
    calibration_images: int | None = None
    evaluation: Attack = "none"
    n_eval: int = 200
    plan: PruningPlan | None = None
    notes: tuple[str, ...] = ()
    input_size: tuple[int, int, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.finetune is None) != (self.epochs == 0):
            raise UsageError(
                f"fine-tuning needs a method and epochs: got {self.finetune!r} for {self.epochs}"
            )
        if (self.calibration_images or 1) < 1 or self.batch_size < 2:
            raise UsageError("calibration needs at least 1 image, and batches at least 2")
        known = (
            ("allocation", self.allocation, allocating.ALLOCATIONS),
            ("score", self.score, scores.SCORES),
            ("MRS method", self.method, mrs.METHODS),
            ("attack", self.evaluation, evaluation.ATTACKS),
        )
        for what, value, values in known:
            if self.plan is None and value not in values:
                raise UsageError(f"{what} {value!r} is not known; use one of {', '.join(values)}")
        if self.finetune is not None:
            resolve(self.finetune)
            self.training()
        if not 0 < self.max_prune_ratio < 1:
            raise UsageError(f"max prune ratio {self.max_prune_ratio:g} must be between 0 and 1")

    def training(self) -> TrainingConfig:
        """Return the settings of the fine-tuning run."""
        assert self.finetune is not None
        return TrainingConfig(
            method=self.finetune,
            epochs=self.epochs,
            threat=self.threat,
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            seed=self.seed,
        )


@dataclass(frozen=True)
class CompressResult:
    """The pruned model, the plan that made it, and the record of the run as plain data."""

    model: nn.Module
    plan: PruningPlan
    report: dict[str, Any]
    sensitivity: Sensitivity | None = None
    history: History | None = None
    dense: Evaluation | None = None
    pruned: Evaluation | None = None


@dataclass(frozen=True)
class Events:
    """What a caller can listen to; every listener may be left out."""

    stage: Callable[[str], None] = lambda line: None
    note: Callable[[str], None] = lambda line: None
    training: Callable[[Progress], None] | None = None
    epoch: Callable[[EpochRecord], None] | None = None
    evaluating: Callable[[str], None] | None = None
    saveable: Callable[[CompressResult], None] = lambda result: None


def compress(
    model: nn.Module,
    data: Any,
    *,
    prune_ratio: float = 0.5,
    target: Target = "macs",
    threat: ThreatModel = LINF_8,
    allocation: str = "mrs",
    score: scores.Score = "taylor",
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
        allocation: `mrs`, or the controls `inverted` and `uniform`.
        score: `taylor` on adversarial images, or `l2`.
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
        job = _Job(model, splits, settings, events)
        job.measure_and_plan()
        job.prune()
        if settings.finetune is not None:
            job.fine_tune()
        if settings.evaluation != "none":
            job.evaluate()
    return job.result


class _Job:
    """One compression: the state that passes from station to station."""

    def __init__(
        self, model: nn.Module, splits: DataSplits | None, settings: Settings, events: Events
    ) -> None:
        self.dense, self.splits = contiguous(model), splits
        self.settings, self.events = settings, events
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = list(splits.notes) if splits else []
        self.model = copy.deepcopy(model)
        make_contiguous_(self.model)
        self.input_size = _input_size(model, splits, settings.input_size)
        if isinstance(self.model, ImageModel):
            self.model.spec = replace(self.model.spec, input_size=self.input_size)
        self.model.eval()
        self.device = device_of(model)
        self.extra: dict[str, Any] = {}
        for line in settings.notes:
            self._note(line)
        if splits is None:
            known = isinstance(model, ImageModel) and model.spec.input_size
            if not known and settings.input_size is None:
                self._note(
                    f"image size assumed: {'x'.join(map(str, self.input_size))}; neither the file "
                    "nor data tell, --input-size does"
                )
            self._note(
                "no data is known: calibrated on synthetic images labelled by the model itself; "
                "nothing is fine-tuned or measured, batch-norm statistics are the dense model's"
            )
            if settings.finetune is not None or settings.evaluation != "none":
                raise DataError("fine-tuning and evaluation need data; name it with --data")

    def measure_and_plan(self) -> None:
        """Adversarial set, MRS, scores, plan."""
        settings = self.settings
        with self._timed("graph"):
            graph = ModelGraph(
                self.model,
                self.input_size,
                protect=settings.protect,
                min_width=settings.min_width,
            )
        self.graph = graph
        self._check_feasible(graph)
        with self._timed("adversarial set"):
            self.events.stage(f"adversarial set: PGD-10, {settings.threat}")
            adversarial = mrs.adversarial_set(
                self.model,
                *self._calibration(),
                threat=settings.threat,
                seed=settings.seed,
                batch_size=min(64, settings.batch_size),
            )
        with self._timed("sensitivity"):
            self.events.stage(f"module robustness sensitivity: {settings.method}")
            self.sensitivity = mrs.sensitivities(
                self.model, adversarial, method=settings.method, groups=graph.groups
            )
        with self._timed("plan"):
            self.plan = settings.plan or self._make_plan(graph, adversarial)
            if settings.plan is not None:
                graph.check(settings.plan)
                self._note(f"replayed plan {settings.plan.digest}")

    def _check_feasible(self, graph: ModelGraph) -> None:
        """Fail before the expensive stations where the budget can't be met."""
        if self.settings.plan is None:
            equal = dict.fromkeys((g.name for g in graph.groups), 1.0)
            allocating.allocate(
                graph.groups,
                graph.cost,
                self.settings.budget,
                equal,
                max_prune_ratio=self.settings.max_prune_ratio,
            )

    def _make_plan(self, graph: ModelGraph, adversarial: mrs.AdversarialSet) -> PruningPlan:
        settings = self.settings
        by_group = self.sensitivity.of_groups()
        widths = allocating.allocate(
            graph.groups,
            graph.cost,
            settings.budget,
            allocating.weights(settings.allocation, by_group),
            max_prune_ratio=settings.max_prune_ratio,
        )
        values = scores.channel_scores(
            self.model,
            {group.name: graph.members(group.name) for group in graph.groups},
            {group.name: group.units for group in graph.groups},
            score=settings.score,
            adversarial=adversarial,
        )
        return allocating.make_plan(
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
        )

    def prune(self) -> None:
        """Remove the channels, then measure batch-norm statistics anew."""
        self.events.stage(f"pruning {len(self.plan.groups)} groups")
        with self._timed("prune"):
            self.graph.apply_(self.plan)
        for line in self.plan.notes:
            self._note(line)
        if self.splits is not None:
            with self._timed("batch norm"):
                layers = calibration.recalibrate_batchnorm_(
                    self.model,
                    self.splits.train.batches(
                        self.settings.batch_size, seed=self.settings.seed, limit=BATCHNORM_IMAGES
                    ),
                )
            images = min(BATCHNORM_IMAGES, len(self.splits.train))
            self.extra["batchnorm"] = {"layers": layers, "images": images if layers else 0}
        self._save("pruned")

    def fine_tune(self) -> None:
        """Train what is left; the best epoch by validation robustness stays."""
        settings = self.settings
        assert self.splits is not None
        assert settings.finetune is not None
        validation = self.splits.validation
        if validation is None:
            raise DataError(
                f"{len(self.splits.train)} images are too few to keep some back for validation; "
                "fine-tuning needs 20 or more"
            )
        config = settings.training()
        if settings.evaluation != "none" and self.splits.test is not None:
            self._before_tuning = self._evaluate(self.model, "pgd")
        self.events.stage(f"fine-tuning: {config.method}, {config.epochs} epochs")
        with self._timed("fine-tune"):
            history = train_(
                self.model,
                self.splits.train,
                validation,
                config,
                on_progress=self.events.training,
                on_epoch=self.events.epoch,
            )
        self.history = history
        for line in history.notes:
            self._note(line)
        self._save("fine-tuned" if not history.interrupted else "fine-tuning interrupted")
        if history.interrupted:
            raise KeyboardInterrupt

    def evaluate(self) -> None:
        """Measure the dense and the pruned model on the same test images."""
        assert self.splits is not None
        if self.splits.test is None:
            raise DataError("there is no test split to evaluate on; give test images as test=")
        self.events.stage(
            f"evaluation: {self.settings.evaluation} on "
            f"{min(self.settings.n_eval, len(self.splits.test))} test images, dense and pruned"
        )
        with self._timed("evaluate"):
            self.dense_evaluation = self._evaluate(self.dense, self.settings.evaluation)
            self.pruned_evaluation = self._evaluate(self.model, self.settings.evaluation)
        self._save("evaluated")

    def _evaluate(self, model: nn.Module, attack: Attack) -> Evaluation:
        assert self.splits is not None
        assert self.splits.test is not None
        if self._test is None:
            settings = self.settings
            self._test = evaluation.draw(self.splits.test, settings.n_eval, settings.seed)
        return evaluation.evaluate(
            model,
            self._test,
            threat=self.settings.threat,
            attack=attack,
            seed=self.settings.seed,
            on_progress=self.events.evaluating,
        )

    _test: TestImages | None = None
    _before_tuning: Evaluation | None = None
    dense_evaluation: Evaluation | None = None
    pruned_evaluation: Evaluation | None = None
    history: History | None = None

    @torch.no_grad()
    def _calibration(self) -> tuple[Tensor, Tensor]:
        """Images to measure sensitivity on: of the training split, never of test."""
        n, seed = self._calibration_count(), self.settings.seed
        if self.splits is None:
            images = data.synthetic_images(n, self.input_size, seed)
            return images, evaluation.predict(self.model, images, 64)
        images, labels = self.splits.train.take(min(n, len(self.splits.train)), seed)
        classes = self.splits.classes if self.splits.source else None
        check_outputs(self.model, images, labels, classes)
        return images, labels

    def _calibration_count(self) -> int:
        """How many images to measure on: what was asked, else what a CPU can do in minutes."""
        asked = self.settings.calibration_images
        if asked is not None or self.device.type != "cpu":
            return asked or CALIBRATION_IMAGES
        # PGD-10 and one more pass, forward and backward
        work = 3 * 11 * max(self.graph.cost().macs, 1)
        least, macs = (64, CPU_MACS) if self.splits is not None else (32, CPU_MACS // 5)
        n = max(least, min(CALIBRATION_IMAGES, macs // work))
        if n < CALIBRATION_IMAGES:
            self._note(
                f"sensitivity is measured on {n} images, not {CALIBRATION_IMAGES}, so that it "
                "ends in minutes on a CPU; --calibration-images takes another number"
            )
        return n

    def _save(self, status: str) -> None:
        self.result = CompressResult(
            model=self.model,
            plan=self.plan,
            report=self._report(status),
            sensitivity=self.sensitivity,
            history=self.history,
            dense=self.dense_evaluation,
            pruned=self.pruned_evaluation,
        )
        self.events.saveable(self.result)

    def _report(self, status: str) -> dict[str, Any]:
        settings = self.settings
        dense, pruned = self.dense_evaluation, self.pruned_evaluation
        plain: dict[str, Any] = to_plain(
            {
                "schema": report.SCHEMA,
                "status": status,
                "model": _describe(self.model),
                "threat": settings.threat,
                "seed": settings.seed,
                "data": dict(self.splits.source) if self.splits else None,
                "data_name": self.splits.name if self.splits else "synthetic images",
                "settings": _plain_settings(settings),
                "sensitivity": self.sensitivity,
                "plan": self.plan,
                "plan_digest": self.plan.digest,
                "cost": {"dense": self.plan.dense, "pruned": self.plan.pruned},
                "finetune": plain_history(self.history),
                "evaluation": {
                    "dense": dense,
                    "pruned_before_finetuning": self._before_tuning,
                    "pruned": pruned,
                    "paired": dense.compare(pruned) if dense and pruned else {},
                },
                "notes": self.notes,
                "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
                "versions": models.versions(),
                "hardware": hardware(self.device),
                **self.extra,
            }
        )
        return plain

    def _note(self, line: str) -> None:
        self.notes.append(line)
        self.events.note(line)

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - start


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
        method: `first-order` (one pass for all layers) or `ascent` (the reference).
        rho: radius of the disturbance relative to each layer's weight norm.
        n: images to measure on.
        seed: of the draw and the attack.
        protect: layers that no group may touch.
        input_size: (channels, height, width), where neither model nor data tell.
        on_module: called with each layer's name when its ascent is done.
    """
    model = contiguous(model)
    splits = open_for(model, source)
    size = _input_size(model, splits, input_size)
    graph = ModelGraph(model, size, protect=protect)
    if splits is None:
        images = data.synthetic_images(n, size, seed)
        labels = evaluation.predict(model, images, 64)
    else:
        images, labels = splits.train.take(min(n, len(splits.train)), seed)
        check_outputs(model, images, labels, splits.classes if splits.source else None)
    adversarial = mrs.adversarial_set(
        model, images, labels, threat=threat, seed=seed, batch_size=64
    )
    return mrs.sensitivities(
        model, adversarial, method=method, rho=rho, groups=graph.groups, on_module=on_module
    )


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
            start = models.create(spec, pretrained=pretrained)
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


def hardware(device: torch.device) -> dict[str, Any]:
    """Return what figures of speed depend on."""
    info = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        info["gpu"] = torch.cuda.get_device_name(device)
    return info


def _input_size(
    model: nn.Module, splits: DataSplits | None, given: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    if splits is not None:
        return splits.input_size
    if given is not None:
        return given
    if isinstance(model, ImageModel):
        return model.spec.input_size or models.default_input_size(model.spec)
    return image_channels(model), 224, 224


def _describe(model: nn.Module) -> dict[str, Any]:
    if isinstance(model, ImageModel):
        plain: dict[str, Any] = to_plain(model.spec)
        return plain
    return {"source": "custom", "arch": f"{type(model).__module__}.{type(model).__qualname__}"}


def _plain_settings(settings: Settings) -> dict[str, Any]:
    plain = {
        name: getattr(settings, name)
        for name in settings.__dataclass_fields__
        if name not in ("plan", "finetune")
    }
    method = settings.finetune
    plain["finetune"] = method if isinstance(method, (str, type(None))) else repr(method)
    return plain


def plain_history(history: History | None) -> Mapping[str, Any] | None:
    """Return a training history as JSON can hold it."""
    if history is None:
        return None
    plain: dict[str, Any] = to_plain(history)
    for epoch in plain["epochs"]:
        if epoch["epoch"] == 0:
            epoch["loss"] = None  # JSON has no NaN, and nothing was trained yet
    return plain
