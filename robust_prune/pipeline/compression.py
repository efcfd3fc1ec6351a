"""The stations of one compression, and what passes from one to the next."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import nn

from robust_prune import evaluation, report
from robust_prune.data import DataSplits, synthetic_images
from robust_prune.distributed import ALONE, Processes
from robust_prune.errors import DataError, RunError
from robust_prune.evaluation import Attack, TestImages
from robust_prune.finetune import EpochRecord, History, batches_of, layout_of, optimizer_of, train_
from robust_prune.graph import ModelGraph, check_pruned
from robust_prune.models import image_size_of, library_versions
from robust_prune.modules import ImageModel, contiguous, device_of, make_contiguous_
from robust_prune.pipeline.journal import Journal
from robust_prune.pipeline.planning import Planned, Planning, graph_of, step_settings
from robust_prune.pipeline.record import describe_model, hardware, plain_history, plain_settings
from robust_prune.pipeline.run_folder import RunFolder, StateFile
from robust_prune.pipeline.settings import CompressResult, Events, Settings
from robust_prune.repair import kept_rows, recalibrate_batchnorm_
from robust_prune.types import (
    Evaluation,
    Measurement,
    PruningPlan,
    Sensitivity,
    to_plain,
    without_nan,
)

BATCHNORM_IMAGES = 2048
SELF_CHECK_IMAGES = 2


class Compression:
    """One compression: the state that passes from station to station.

    With a run folder every station keeps what it has done there, and takes up what is there
    already. With several processes the first one measures, plans and prunes, and gives plan and
    weights to the others; all train and evaluate.
    """

    def __init__(
        self,
        model: nn.Module,
        splits: DataSplits | None,
        settings: Settings,
        events: Events,
        folder: RunFolder | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.dense, self.splits, self.settings = contiguous(model), splits, settings
        self.events, self.folder, self.processes = events, folder, processes
        self.journal = Journal(events)
        self.journal.notes += splits.notes if splits else ()
        self.model = copy.deepcopy(model)
        make_contiguous_(self.model)
        self.input_size = image_size_of(model, splits.input_size if splits else settings.input_size)
        if isinstance(self.model, ImageModel):
            self.model.spec = replace(self.model.spec, input_size=self.input_size)
        self.model.eval()
        self.plans: list[PruningPlan] = []
        self._names: dict[str, str] = {}  # of groups, from those they have now to the dense model's
        self.sensitivity: Sensitivity | None = None  # of the dense model
        self.history: History | None = None
        self.evaluations: dict[str, Evaluation] = {}
        self._test: TestImages | None = None
        self._check(model)

    def _check(self, model: nn.Module) -> None:
        """Say what is assumed, and fail before the work where something is missing."""
        settings, splits = self.settings, self.splits
        for line in settings.notes:
            self.journal.note(line)
        if splits is None:
            known = isinstance(model, ImageModel) and model.spec.input_size
            if not known and settings.input_size is None:
                self.journal.note(
                    f"image size assumed: {'x'.join(map(str, self.input_size))}; neither the file "
                    "nor data tell, --input-size does"
                )
            self.journal.note(
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
        if settings.finetune is not None:
            config = settings.training()
            optimizer_of(self.model, config)
            layout_of(self.model, config)
            batches_of(len(splits.train), config.batch_size, self.processes.size)

    @property
    def plan(self) -> PruningPlan:
        """The plan from the dense model to what is there now."""
        whole = self.plans[0]
        for later in self.plans[1:]:
            whole = whole.then(later)
        return replace(whole, budget=self.settings.budget)

    def prune(self, step: int) -> None:
        """Plan and prune, or take up what a run before has planned and pruned.

        Args:
            step: which of the pruning steps, from 1.
        """
        settings = self._step_settings(step)
        last = step == self.settings.prune_steps
        if settings is None:
            self.journal.note(f"step {step} prunes nothing: the one before has gone that far")
        else:
            self._prune(settings, step)
            if not last and settings.finetune is None:
                self._end_step(None)
        if last and not self._was_tuned(step):  # else the file that is there is the better one
            self._save("pruned")

    def _prune(self, settings: Settings, step: int) -> None:
        tell = f" in step {step} of {settings.prune_steps}" if settings.prune_steps > 1 else ""
        source = copy.deepcopy(self.model) if settings.prune_steps > 1 else self.dense
        self.journal.parts.clear()  # those of the step before
        planned = self.processes.on_first(lambda: self._prune_first(source, settings, step, tell))
        if not self.processes.first:
            self._cut(graph_of(self.model, self.input_size, settings), planned.plan)
        self.processes.share_(self.model)
        self.sensitivity = self.sensitivity or planned.sensitivity
        self.history = None

    def _cut(self, graph: ModelGraph, plan: PruningPlan) -> None:
        """Apply a plan, and remember it under the names that groups have in the dense model."""
        names = graph.names_after(plan)
        graph.apply_(plan)
        self.plans.append(plan.renamed(self._names))
        self._names = {after: self._names.get(name, name) for after, name in names.items()}

    def _end_step(self, history: History | None) -> None:
        """Tell of a step in the report, as the last one is told of."""
        step = {"plan": self.plans[-1], "finetune": history, **self.journal.parts}
        self.journal.steps.append(step)

    def _was_tuned(self, step: int) -> bool:
        saved = self._saved(f"tuned-{step}")
        return saved is not None and saved.exists()

    def _step_settings(self, step: int) -> Settings | None:
        target = self.settings.budget.target
        left = self.plan.pruned.of(target) / self.plan.dense.of(target) if self.plans else 1.0
        return step_settings(self.settings, left, step)

    def _prune_first(self, source: nn.Module, settings: Settings, step: int, tell: str) -> Planned:
        """What the first process does: plan and prune, each kept in the run's folder once done."""
        kept = self._kept(f"planned-{step}")
        planned = Planned.from_plain(kept) if kept else None
        done = self._kept(f"pruned-{step}")
        if planned is not None and done is not None:
            self.journal.stage(f"pruned as before{tell}: plan {planned.plan.digest}")
            self._cut(graph_of(self.model, self.input_size, settings), planned.plan)
            assert self.folder is not None
            state = self.folder.state(f"pruned-{step}").load()
            if state is None:
                raise RunError(f"{self.folder.path}: pruned-{step}.pt is missing; start anew")
            self.model.load_state_dict(state["model"])
            self.journal.restore(done["journal"])
            return planned
        planning = Planning(self.model, self.splits, settings, self.journal, self.input_size)
        if step == 1:
            Planning.check_feasible(planning)
        if planned is not None and kept is not None:
            self.journal.restore(kept["journal"])
        planned = planning.measure_and_plan(planned)
        self._keep(f"planned-{step}", to_plain(planned))
        self._apply(planning, planned, source, settings, tell)
        if self.folder is not None:
            self.folder.state(f"pruned-{step}").save({"model": self.model.state_dict()})
        self._keep(f"pruned-{step}", {})
        return planned

    def _apply(
        self,
        planning: Planning,
        planned: Planned,
        source: nn.Module,
        settings: Settings,
        tell: str,
    ) -> None:
        """Remove the channels, repair what is left, and measure batch-norm statistics anew."""
        plan, journal = planned.plan, self.journal
        journal.stage(f"pruning {len(plan.groups)} groups{tell}")
        rows = kept_rows(planning.graph, plan)
        with journal.timed("prune"):
            self._cut(planning.graph, plan)
        journal.parts["self_check"] = self._self_check(source, plan)
        if planning.reconstruction is not None:
            with journal.timed("reconstruction"):
                fits = planning.reconstruction.apply_(self.model, rows)
            images = len(planning.reconstruction.images)
            journal.parts["reconstruction"] = {"images": images, "layers": fits}
        for line in plan.notes:
            journal.note(line)
        if self.splits is not None:
            with journal.timed("batch norm"):
                layers = recalibrate_batchnorm_(
                    self.model,
                    self.splits.train.batches(
                        settings.batch_size, seed=settings.seed, limit=BATCHNORM_IMAGES
                    ),
                )
            images = min(BATCHNORM_IMAGES, len(self.splits.train))
            journal.parts["batchnorm"] = {"layers": layers, "images": images if layers else 0}

    def _self_check(self, source: nn.Module, plan: PruningPlan) -> dict[str, Any]:
        """Compare with the masked model before anything else is changed."""
        if not self.settings.verify:
            self.journal.note("the pruned model was not compared with the masked dense one")
            return {"done": False}
        with self.journal.timed("self-check"):
            images = synthetic_images(SELF_CHECK_IMAGES, self.input_size, self.settings.seed)
            error, dtype = check_pruned(source, self.model, plan, images)
        name = str(dtype).removeprefix("torch.")
        return {"done": True, "images": len(images), "dtype": name, "error": error}

    def fine_tune(self, step: int) -> None:
        """Train what is left; validation robustness decides which epoch stays."""
        settings = self.settings
        assert self.splits is not None
        assert self.splits.validation is not None
        config = settings.training(step)
        last = step == settings.prune_steps
        if last and settings.evaluation != "none":
            self.evaluations["before"] = self._evaluate(self.model, "pgd", "before")
        where = "" if settings.prune_steps == 1 else f" after step {step} of {settings.prune_steps}"
        self.journal.stage(f"fine-tuning{where}: {config.method}, {config.epochs} epochs")
        with self.journal.timed("fine-tune"):
            history = train_(
                self.model,
                self.splits.train,
                self.splits.validation,
                config,
                teacher=self.dense,
                processes=self.processes,
                saved=self._saved(f"tuned-{step}"),
                on_progress=self.events.training,
                on_epoch=self._listener(f"step {step}"),
            )
        self.history = history
        for line in history.notes:
            self.journal.note(line)
        if last or history.interrupted:
            self._save("fine-tuned" if not history.interrupted else "fine-tuning interrupted")
        if history.interrupted:
            raise KeyboardInterrupt
        if not last:
            self._end_step(history)

    def _listener(self, part: str) -> Any:
        def on_epoch(record: EpochRecord) -> None:
            if self.folder is not None and self.processes.first:
                self.folder.record(part, to_plain(record))
            if self.events.epoch is not None:
                self.events.epoch(record)

        return on_epoch

    def evaluate(self) -> None:
        """Measure the dense and the pruned model on the same test images."""
        assert self.splits is not None
        assert self.splits.test is not None
        attack = self.settings.evaluation
        self.journal.stage(
            f"evaluation: {attack} on {min(self.settings.n_eval, len(self.splits.test))} test "
            "images, dense and pruned"
        )
        with self.journal.timed("evaluate"):
            for which, model in (("dense", self.dense), ("pruned", self.model)):
                self.evaluations[which] = self._evaluate(model, attack, which)
        self._save("evaluated")

    def _evaluate(self, model: nn.Module, attack: Attack, which: str) -> Evaluation:
        """Measure a model; each attack that a run before has finished is taken from its folder."""
        assert self.splits is not None
        assert self.splits.test is not None
        settings = self.settings
        if self._test is None:
            self._test = evaluation.draw(self.splits.test, settings.n_eval, settings.seed)
        part = f"measured-{which}"
        found = self.processes.from_first(self._kept(part)) or {}
        done = [Measurement.from_plain(m) for m in found.get("measurements", ())]

        def keep(measurement: Measurement) -> None:
            done.append(measurement)
            self._keep(part, {"measurements": [to_plain(m) for m in done]})

        return evaluation.evaluate(
            model,
            self._test,
            threat=settings.threat,
            attack=attack,
            seed=settings.seed,
            processes=self.processes,
            done=tuple(done),
            on_measured=keep,
            on_progress=self.events.evaluating,
        )

    # the run's folder

    def _kept(self, name: str) -> Any:
        if self.folder is None or not self.processes.first:
            return None
        found = self.folder.kept(name)
        if found is not None:
            # what a run before has worked counts
            for station, seconds in found["journal"]["seconds"].items():
                so_far = self.journal.seconds.get(station, 0.0)
                self.journal.seconds[station] = max(so_far, seconds)
        return found

    def _keep(self, name: str, part: dict[str, Any]) -> None:
        if self.folder is not None and self.processes.first:
            self.folder.keep(name, {**part, "journal": self.journal.snapshot()})

    def _saved(self, name: str) -> StateFile | None:
        return None if self.folder is None else self.folder.state(name)

    def _save(self, status: str) -> None:
        """Hand the result on, so that it can be written whatever comes later."""
        self.result = CompressResult(
            model=self.model,
            plan=self.plan,
            report=report_of(self, status),
            sensitivity=self.sensitivity,
            history=self.history,
            dense=self.evaluations.get("dense"),
            pruned=self.evaluations.get("pruned"),
        )
        self.events.saveable(self.result)


def report_of(job: Compression, status: str) -> dict[str, Any]:
    """Return the report of a compression as far as it has come, as plain data."""
    settings, plan, splits = job.settings, job.plan, job.splits
    dense, pruned = job.evaluations.get("dense"), job.evaluations.get("pruned")
    plain: dict[str, Any] = to_plain(
        {
            "schema": report.SCHEMA,
            "status": status,
            "model": describe_model(job.model),
            "threat": settings.threat,
            "seed": settings.seed,
            "processes": job.processes.size,
            "data": dict(splits.source) if splits else None,
            "data_name": splits.name if splits else "synthetic images",
            "settings": plain_settings(settings),
            "sensitivity": job.sensitivity,
            "plan": plan,
            "plan_digest": plan.digest,
            "cost": {"dense": plan.dense, "pruned": plan.pruned},
            "finetune": plain_history(job.history),
            "steps": without_nan(to_plain(job.journal.steps)),
            "evaluation": {
                "dense": dense,
                "pruned_before_finetuning": job.evaluations.get("before"),
                "pruned": pruned,
                "paired": dense.compare(pruned) if dense and pruned else {},
            },
            "notes": job.journal.notes,
            "seconds": {name: round(value, 3) for name, value in job.journal.seconds.items()},
            "versions": library_versions(),
            "hardware": hardware(device_of(job.model)),
            **job.journal.parts,
        }
    )
    return plain
