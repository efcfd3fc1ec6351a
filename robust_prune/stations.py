"""The stations of one compression, and what passes from one to the next."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robust_prune import allocation as allocating
from robust_prune import (
    builders,
    calibration,
    data,
    evaluation,
    mrs,
    report,
    scores,
    search,
    verify,
)
from robust_prune.curves import IMAGE_PASSES, Curve, measure_mrs, structural_curves
from robust_prune.data import DataSplits
from robust_prune.errors import DataError
from robust_prune.evaluation import Attack, TestImages
from robust_prune.finetune.loop import History, train_
from robust_prune.graph import ModelGraph
from robust_prune.modules import (
    ImageModel,
    check_outputs,
    contiguous,
    device_of,
    image_channels,
    make_contiguous_,
)
from robust_prune.reconstruction import Reconstruction, kept_rows
from robust_prune.record import describe_model, hardware, plain_history, plain_settings
from robust_prune.settings import CALIBRATION_IMAGES, CompressResult, Events, Settings
from robust_prune.types import (
    Evaluation,
    PruningPlan,
    to_plain,
)

CPU_MACS = 10**13  # some minutes of a few cores
BATCHNORM_IMAGES = 2048
SELF_CHECK_IMAGES = 2
SEARCH_IMAGES = 16, 256  # at least, at most
ENOUGH_HELD_OUT = 256


class Compression:
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
        self.input_size = image_size_of(model, splits, settings.input_size)
        if isinstance(self.model, ImageModel):
            self.model.spec = replace(self.model.spec, input_size=self.input_size)
        self.model.eval()
        self.device = device_of(model)
        self.extra: dict[str, Any] = {}
        self.history: History | None = None
        self.dense_evaluation: Evaluation | None = None
        self.pruned_evaluation: Evaluation | None = None
        self._before_tuning: Evaluation | None = None
        self._test: TestImages | None = None
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
            return
        if settings.finetune is not None and splits.validation is None:
            raise DataError(
                f"{len(splits.train)} images are too few to keep some back for validation; "
                "fine-tuning needs 20 or more"
            )
        if settings.evaluation != "none" and splits.test is None:
            raise DataError("there is no test split to evaluate on; give test images as test=")

    def measure_and_plan(self) -> None:
        """Adversarial set, scores, curves, MRS, plan."""
        settings, model = self.settings, self.model
        with self._timed("graph"):
            graph = ModelGraph(
                self.model,
                self.input_size,
                protect=settings.protect,
                min_width=settings.min_width,
                ties=settings.plan.ties if settings.plan else (),
                whole_heads=settings.plan.whole_heads if settings.plan else settings.whole_heads,
            )
        self.graph = graph
        self.extra["reachable"] = graph.reachable
        self._check_feasible(graph)
        with self._timed("adversarial set"):
            self.events.stage(f"adversarial set: PGD-10, {settings.threat}")
            n = self._calibration_count()
            size = self.input_size
            self._calibration = calibration_images(model, self.splits, size, n, settings.seed)
            adversarial = mrs.adversarial_set(
                model,
                *self._calibration,
                threat=settings.threat,
                seed=settings.seed,
                batch_size=min(64, settings.batch_size),
            )
        values: Mapping[str, Tensor] = {}
        curves: Mapping[str, Curve] = {}
        if settings.plan is None:
            with self._timed("scores"):
                score = settings.score
                values = scores.channel_scores(model, graph, score=score, adversarial=adversarial)
            if settings.allocation == "curve":
                self.events.stage(f"curves of {len(graph.groups)} groups")
                passes = self._image_passes()
                with self._timed("curves"):
                    curves = structural_curves(model, graph, values, adversarial, passes=passes)
                self.extra["curves"] = list(curves.values())
        with self._timed("sensitivity"):
            self.events.stage(f"module robustness sensitivity: {settings.method}")
            self.sensitivity = measure_mrs(graph, adversarial, settings.method, values)
        self.reconstruction = self._reconstruction(adversarial)
        with self._timed("plan"):
            self.plan = settings.plan or self._make_plan(graph, values, curves)
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
                round_to=self.settings.round_to,
            )

    def _reconstruction(self, adversarial: mrs.AdversarialSet) -> Reconstruction | None:
        """Note what the dense model does on adversarial images and on as many clean ones."""
        if self.splits is None or not self.settings.reconstruct:
            return None
        with self._timed("reconstruction"):
            train = self.splits.train
            clean, _ = train.take(min(len(adversarial), len(train)), self.settings.seed + 1)
            pairs = zip(adversarial.images, clean.to(self.device), strict=False)
            images = torch.stack([image for pair in pairs for image in pair])
            return Reconstruction.of(self.model, images)

    def _make_plan(
        self, graph: ModelGraph, values: Mapping[str, Tensor], curves: Mapping[str, Curve]
    ) -> PruningPlan:
        settings = self.settings
        by_group = self.sensitivity.of_groups()

        def plan(widths: Mapping[str, int]) -> PruningPlan:
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
                ties=graph.ties,
                whole_heads=graph.whole_heads,
            )

        if settings.allocation == "curve":
            return self._search(graph, curves, plan)
        widths = allocating.allocate(
            graph.groups,
            graph.cost,
            settings.budget,
            allocating.weights(settings.allocation, by_group),
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
            for widths in search.candidates(
                graph,
                settings.budget,
                curves,
                max_prune_ratio=settings.max_prune_ratio,
                round_to=settings.round_to,
            )
        ]
        self.events.stage(f"attacking {len(plans)} candidates")
        few, many = SEARCH_IMAGES
        n = max(few, min(many, self._image_passes() // (search.PASSES * len(plans))))
        images, labels = (part[:n] for part in self._calibration)

        def repair_(pruned: nn.Module, plan: PruningPlan) -> None:
            if self.reconstruction is not None:
                self.reconstruction.apply_(pruned, kept_rows(graph, plan))
            if splits is not None:
                batches = splits.train.batches(64, seed=settings.seed, limit=2 * len(labels))
                calibration.recalibrate_batchnorm_(pruned, batches)

        best, losses = search.best_composed(
            graph,
            plans,
            images,
            labels,
            threat=settings.threat,
            seed=settings.seed,
            batch_size=min(64, settings.batch_size),
            repair_=repair_,
        )
        self.extra["search"] = {
            "attack": f"PGD-{search.STEPS}",
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

    def prune(self) -> None:
        """Remove the channels, then measure batch-norm statistics anew."""
        self.events.stage(f"pruning {len(self.plan.groups)} groups")
        rows = kept_rows(self.graph, self.plan)
        with self._timed("prune"):
            self.graph.apply_(self.plan)
        self.extra["self_check"] = self._self_check()
        if self.reconstruction is not None:
            with self._timed("reconstruction"):
                fits = self.reconstruction.apply_(self.model, rows)
            images = len(self.reconstruction.images)
            self.extra["reconstruction"] = {"images": images, "layers": fits}
            self.reconstruction = None
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

    def _self_check(self) -> dict[str, Any]:
        """Compare with the masked dense model before anything else is changed."""
        if not self.settings.verify:
            self._note("the pruned model was not compared with the masked dense one")
            return {"done": False}
        with self._timed("self-check"):
            images = data.synthetic_images(SELF_CHECK_IMAGES, self.input_size, self.settings.seed)
            error, dtype = verify.check_pruned(self.dense, self.model, self.plan, images)
        name = str(dtype).removeprefix("torch.")
        return {"done": True, "images": len(images), "dtype": name, "error": error}

    def fine_tune(self) -> None:
        """Train what is left; the best epoch by validation robustness stays."""
        settings = self.settings
        assert self.splits is not None
        assert settings.finetune is not None
        validation = self.splits.validation
        assert validation is not None
        config = settings.training()
        if settings.evaluation != "none":
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
        assert self.splits.test is not None
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

    def _image_passes(self) -> int:
        """How many images times forward passes curves, and the search, may each take."""
        if self.device.type != "cpu":
            return IMAGE_PASSES
        macs = CPU_MACS if self.splits is not None else CPU_MACS // 10
        return min(IMAGE_PASSES, macs // max(self.graph.cost().macs, 1))

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
                "model": describe_model(self.model),
                "threat": settings.threat,
                "seed": settings.seed,
                "data": dict(self.splits.source) if self.splits else None,
                "data_name": self.splits.name if self.splits else "synthetic images",
                "settings": plain_settings(settings),
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
                "versions": builders.versions(),
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
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def calibration_images(
    model: nn.Module, splits: DataSplits | None, size: tuple[int, int, int], n: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return images and labels to measure sensitivity on: held out of training, never of test.

    Where few are held out they are training images. Without data the images are synthetic, and
    labelled by the model itself.
    """
    if splits is None:
        images = data.synthetic_images(n, size, seed)
        return images, evaluation.predict(model, images, 64)
    held_out = splits.validation
    source = splits.train if held_out is None or len(held_out) < ENOUGH_HELD_OUT else held_out
    images, labels = source.take(min(n, len(source)), seed)
    check_outputs(model, images, labels, splits.classes or None)
    return images, labels


def image_size_of(
    model: nn.Module, splits: DataSplits | None, given: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    """Return the image size that costs are counted at: the data's, the one given, or assumed."""
    if splits is not None:
        return splits.input_size
    if given is not None:
        return given
    if isinstance(model, ImageModel):
        return model.spec.input_size or builders.default_input_size(model.spec)
    return image_channels(model), 224, 224
