"""What a compression is given, and how far it has come: what passes from station to station."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from robust_prune import evaluation
from robust_prune.allocation import for_all_steps
from robust_prune.data import DataSplits
from robust_prune.distributed import Processes
from robust_prune.errors import DataError, UsageError
from robust_prune.evaluation import TestImages
from robust_prune.finetune import (
    History,
    batches_of,
    layout_of,
    needs_teacher,
    optimizer_of,
    resolve_method,
)
from robust_prune.models import image_size_of
from robust_prune.modules import ImageModel, contiguous, sharing
from robust_prune.options import AUTO
from robust_prune.pipeline.grade import GIVE_DATA, grade_of
from robust_prune.pipeline.journal import Journal
from robust_prune.pipeline.run_folder import RunFolder
from robust_prune.pipeline.settings import CompressResult, Events, Settings
from robust_prune.types import Evaluation, PruningPlan, Sensitivity


@dataclass(frozen=True)
class Job:
    """What is the same from the first station to the last.

    Attributes:
        dense: the model as it came.
        splits: the data, None where there are none.
        settings: of the whole run.
        input_size: (channels, height, width) of an image.
        events: what a caller listens to.
        journal: where stations write what they have to tell.
        folder: where they keep what they have done, None where nothing is kept.
        processes: the first one measures, plans and prunes, and gives plan and weights to the
            others; all train and evaluate.
    """

    dense: nn.Module
    splits: DataSplits | None
    settings: Settings
    input_size: tuple[int, int, int]
    events: Events
    journal: Journal
    folder: RunFolder | None
    processes: Processes

    @cached_property
    def test_images(self) -> TestImages:
        """The images that every model of the run is measured on; the first of them with `auto`."""
        assert self.splits is not None
        assert self.splits.test is not None
        n = self.settings.n_eval if self.settings.n_eval != AUTO else evaluation.FIRST
        return evaluation.draw(self.splits.test, n, self.settings.seed)


@dataclass(frozen=True)
class Cut:
    """A plan that was applied, the sensitivity it was made with, and what groups are called now.

    `names` gives by a group's name in the pruned model its name before.
    """

    plan: PruningPlan
    sensitivity: Sensitivity
    names: Mapping[str, str]


@dataclass(frozen=True)
class State:
    """How far a run has come.

    Attributes:
        model: the one thing that stations change in place: a copy for each would not fit memory.
        plans: one for each pruning step, by the names that groups have in the dense model.
        names: of groups, from those they have now to the dense model's.
        sensitivity: of the dense model.
        history: of the fine-tuning after the last pruning step.
        before: measured before the last fine-tuning.
        dense: measured on the dense model.
        pruned: measured on what came out.
        result: what was handed on last.
    """

    model: nn.Module
    plans: tuple[PruningPlan, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None
    history: History | None = None
    before: Evaluation | None = None
    dense: Evaluation | None = None
    pruned: Evaluation | None = None
    result: CompressResult | None = None

    def after(self, cut: Cut) -> State:
        """Return the state once a plan is applied to the model."""
        return replace(
            self,
            plans=(*self.plans, cut.plan.renamed(self.names)),
            names={now: self.names.get(name, name) for now, name in cut.names.items()},
            sensitivity=self.sensitivity or cut.sensitivity,
            history=None,
        )

    def plan(self, job: Job) -> PruningPlan:
        """Return the plan from the dense model to what is there now."""
        whole = self.plans[0]
        for later in self.plans[1:]:
            whole = whole.then(later)
        if job.settings.prune_steps > 1:
            return for_all_steps(whole, job.settings.budget)
        searched = job.settings.latency or job.settings.max_drop is not None
        return whole if searched else replace(whole, budget=job.settings.budget)

    def left(self, job: Job) -> float:
        """Return the share of the dense model's target that is there now."""
        if not self.plans:
            return 1.0
        plan, target = self.plan(job), job.settings.budget.target
        return plan.pruned.of(target) / plan.dense.of(target)


def begin(
    model: nn.Module,
    splits: DataSplits | None,
    settings: Settings,
    events: Events,
    folder: RunFolder | None,
    processes: Processes,
) -> tuple[Job, State]:
    """Return what a run starts from, with a copy of `model` to work on.

    Raises:
        DataError: a station lacks the images that it needs.
        UsageError: fine-tuning can't be set up this way.
    """
    input_size = image_size_of(model, splits.input_size if splits else settings.input_size)
    journal = Journal(events, splits.notes if splits else ())
    dense = contiguous(model)
    job = Job(dense, splits, settings, input_size, events, journal, folder, processes)
    working = sharing(dense)  # until it is cut: two copies of a large model are much
    if isinstance(working, ImageModel):
        working.spec = replace(working.spec, input_size=input_size)
    working.eval()
    for line in settings.notes:
        journal.note(line)
    if splits is None:
        _check_without_data(job, model)
    else:
        _check_data(job, splits, working)
    return job, State(working)


def _check_without_data(job: Job, model: nn.Module) -> None:
    """Say what is assumed, and fail where data are needed."""
    settings, journal = job.settings, job.journal
    known = isinstance(model, ImageModel) and model.spec.input_size
    if not known and settings.input_size is None:
        journal.note(
            f"image size assumed: {'x'.join(map(str, job.input_size))}; neither the file nor data "
            "tell, --input-size does"
        )
    journal.note(
        "no data is known: decided on stand-in photographs labelled by the model itself; nothing "
        f"is fine-tuned or measured; {GIVE_DATA}"
    )
    if settings.finetune is not None or settings.evaluation != "none":
        raise DataError("fine-tuning and evaluation need data; name it with --data")
    if settings.max_drop is not None:
        raise DataError("--max-drop measures on held-out images; name the data with --data")


def _check_data(job: Job, splits: DataSplits, model: nn.Module) -> None:
    """Fail before the work where a later station could not do its part."""
    settings = job.settings
    if settings.finetune is not None and splits.validation is None:
        raise DataError(
            f"{len(splits.train)} images are too few to keep some back for validation; "
            "fine-tuning needs 20 or more"
        )
    if not splits.labelled:
        _check_unlabelled(job, splits)
    if settings.max_drop is not None:
        _check_search(job, splits)
    if settings.evaluation != "none" and splits.test is None:
        raise DataError("there is no test split to evaluate on; give test images as test=")
    if settings.finetune is not None:
        config = settings.training()
        optimizer_of(model, config)
        layout_of(model, config)
        batches_of(len(splits.train), config.batch_size, job.processes.size)
        for split in (splits.train, splits.validation):
            if split is not None:
                split.decode()  # all of them will be looked at


def _check_search(job: Job, splits: DataSplits) -> None:
    """Raise where no accuracy can be measured to search by."""
    if not splits.labelled:
        raise DataError("--max-drop needs labels to measure accuracy; name labelled --data")
    if splits.validation is None:
        raise DataError(
            f"{len(splits.train)} images are too few to keep some back for --max-drop; it needs "
            "20 or more"
        )
    if job.settings.max_drop_of == "tuned" and job.processes.size > 1:
        raise UsageError("--max-drop-of tuned: in one process only; leave it out, or start one")


def _check_unlabelled(job: Job, splits: DataSplits) -> None:
    """Say that labels are verdicts; only a teacher can train on such images."""
    grade = grade_of(splits, job.settings.budget.prune_ratio)
    job.journal.note(f"{grade['grade']}; {grade['advice']}")
    method = job.settings.finetune
    if method is not None and not needs_teacher(resolve_method(method)[1]):
        raise DataError(
            f"{method} learns from labels, and these pictures have none; rslad and ard learn from "
            "the dense model"
        )
