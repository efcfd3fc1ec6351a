"""As much as can go within a drop of robust accuracy: a search over ratios on measured models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from robust_prune import evaluation
from robust_prune.adversaries import pgd_correct
from robust_prune.allocation import narrowest_without
from robust_prune.criteria import calibration_split
from robust_prune.errors import BudgetError
from robust_prune.evaluation import PGD_STEPS
from robust_prune.finetune import train_
from robust_prune.graph import is_large
from robust_prune.modules import device_of
from robust_prune.pipeline.effort import CPU_MACS
from robust_prune.pipeline.job import Job
from robust_prune.pipeline.keeping import keep, kept, readable_part
from robust_prune.pipeline.measuring import FEWEST_JUDGED, Measured, Observed
from robust_prune.pipeline.planning import plan, problem_of
from robust_prune.pipeline.record import DropSearch, Pruned, Tried, tried
from robust_prune.pipeline.repairing import repair_
from robust_prune.pipeline.settings import Settings
from robust_prune.repair import Repaired, kept_rows
from robust_prune.statistics import PairedDrop
from robust_prune.types import Budget, PruningPlan, to_plain

# between ratios: finer ones are apart by less than the images can tell
STEP = {"untuned": 0.02, "tuned": 0.05}
IMAGES = FEWEST_JUDGED, 2000  # at least and, on a CPU, at most
CHUNK = 200  # images between two looks at the interval
SURE = 0.999  # confidence at which no more images are attacked
KEPT = "searched"


@dataclass
class _Found:
    """The plan of the largest ratio within the drop, and what was told of it."""

    plan: PruningPlan
    told: Pruned
    repaired: dict[str, Repaired] = field(default_factory=dict)


def plan_within_drop(
    job: Job, observed: Observed, measured: Measured, settings: Settings
) -> PruningPlan:
    """Return the plan of the largest ratio whose model loses at most `max_drop` points.

    Bisection over ratios: every one that is tried is planned, really pruned, repaired, fine-tuned
    where `max_drop_of` says so, and attacked on validation images, which no plan and no training
    step has seen (where there is fine-tuning they choose its epoch); the dense model is attacked on
    the same. What is measured was kept by a run before, and is then not measured again.

    Raises:
        BudgetError: the smallest ratio already costs more.
    """
    step = STEP[settings.max_drop_of]
    judge, before = _Judge(job, settings, observed), _kept_before(job)
    found: list[_Found] = []
    told: dict[int, Tried] = {}

    def within(place: int) -> bool:
        ratio = round(place * step, 4)
        asked = replace(settings, budget=Budget(settings.budget.target, ratio))
        trial = before.get(ratio)
        if trial is not None and not trial.within:
            told[place] = trial
            return False
        try:
            made = plan(job, observed, measured, asked)
        except BudgetError:
            return False
        one = _Found(made, job.journal.record.pruned)
        if trial is None:
            trial = _tried(job, observed, asked, one, judge)
            before[ratio] = trial
            keep(job, KEPT, {"tried": [to_plain(t) for t in before.values()]})
        told[place] = trial
        job.journal.stage(_line(trial, settings))
        if trial.within:
            found[:] = [one]
        return trial.within

    most = _places(observed, settings, step)
    best = largest(most, within)
    if not found:
        raise _out_of_reach(told, settings)
    taken = found[0]
    observed.repaired.clear()
    observed.repaired.update(taken.repaired)
    job.journal.tell(
        search=taken.told.search,
        latency=taken.told.latency,
        drop_search=DropSearch(
            max_drop=settings.max_drop or 0.0,
            models="fine-tuned" if settings.max_drop_of == "tuned" else "un-tuned",
            attack=judge.attack,
            seed=settings.seed,
            split="validation",
            chosen=round(best * step, 4),
            tried=tuple(told[place] for place in sorted(told)),
        ),
    )
    return taken.plan


def largest(most: int, within: Callable[[int], bool]) -> int:
    """Return the largest place in 1 to `most` that is within, by halving; 0 where none is.

    Places are taken to be within up to one of them and not beyond it. The answer was measured, and
    so was the place after it.
    """
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low


class _Judge:
    """Attacks models on validation images, and the dense one on the same, once for each image.

    The images that the plan is made on are not among them.
    """

    def __init__(self, job: Job, settings: Settings, observed: Observed) -> None:
        assert job.splits is not None
        split = job.splits.validation
        assert split is not None
        self.job, self.settings = job, settings
        planned_on = calibration_split(job.splits, observed.effort.images, FEWEST_JUDGED)
        self.test = evaluation.draw(
            split,
            _images(job, observed.graph.cost().macs),
            settings.seed,
            name="validation",
            begin=len(observed.images) if planned_on is split else 0,
        )
        self.attack = f"PGD-{PGD_STEPS}, {settings.threat}"
        self._dense: list[Tensor] = []

    def drop(self, model: nn.Module) -> tuple[PairedDrop, float, float]:
        """Return the drop, and the accuracy of both on the images it took to tell.

        After every chunk the search looks whether the interval leaves the limit on one side.
        """
        limit = (self.settings.max_drop or 0.0) / 100
        mine: list[Tensor] = []
        with self.job.journal.timed("ratio search"):
            for place, start in enumerate(range(0, len(self.test.labels), CHUNK)):
                if place == len(self._dense):
                    self._dense.append(self._verdicts(self.job.dense, start))
                mine.append(self._verdicts(model, start))
                pruned, dense = torch.cat(mine), torch.cat(self._dense[: len(mine)])
                found = PairedDrop(
                    int((dense & ~pruned).sum()), int((pruned & ~dense).sum()), len(pruned)
                )
                low, high = found.interval(SURE)
                if limit < low or high < limit:
                    break
        return found, float(dense.float().mean()), float(pruned.float().mean())

    def _verdicts(self, model: nn.Module, start: int) -> Tensor:
        chunk = slice(start, start + CHUNK)
        return pgd_correct(
            model,
            self.test.images[chunk],
            self.test.labels[chunk],
            threat=self.settings.threat,
            steps=PGD_STEPS,
            seed=self.settings.seed + start,
            batch_size=100,
        )


def _tried(job: Job, observed: Observed, settings: Settings, one: _Found, judge: _Judge) -> Tried:
    """Prune a copy by the plan, repair and perhaps tune it, and measure what it lost."""
    graph, made = observed.graph, one.plan
    model = graph.pruned(made)
    repair_(job, model, observed, made, kept_rows(graph, made), settings)
    fitted, tuned = job.journal.record.pruned.reconstruction, settings.max_drop_of == "tuned"
    if fitted is not None and not tuned and not is_large(graph.model):  # training changes them
        one.repaired[made.digest] = Repaired.of(model, fitted.layers)
    if tuned:
        _tune_(job, model, settings)
    drop, dense, pruned = judge.drop(model)
    removed = made.reached
    if one.told.latency is not None:
        removed = 1 - one.told.latency.pruned_ms / one.told.latency.dense_ms
    return Tried(
        prune_ratio=settings.budget.prune_ratio,
        removed=removed,
        images=drop.n,
        dense=dense,
        pruned=pruned,
        drop=drop.value,
        interval=drop.interval(),
        within=100 * (drop.first_only - drop.second_only) <= (settings.max_drop or 0.0) * drop.n,
    )


def _tune_(job: Job, model: nn.Module, settings: Settings) -> None:
    """Train as the run itself will: by the same seed, to the same weights."""
    assert job.splits is not None
    assert job.splits.validation is not None
    with job.journal.timed("ratio search"):
        history = train_(
            model,
            job.splits.train,
            job.splits.validation,
            settings.training(),
            teacher=job.dense,
            on_progress=job.events.training,
            on_epoch=job.events.epoch,
        )
    if history.interrupted:
        raise KeyboardInterrupt


def _places(observed: Observed, settings: Settings, step: float) -> int:
    """Return how many steps the largest ratio is that groups can give."""
    problem = problem_of(observed.graph, settings, observed.latency)
    blocks = observed.graph.blocks if settings.whole_blocks else ()
    least = narrowest_without(problem, [block.groups for block in blocks])
    most = 1 - problem.cost_at(least) / problem.dense
    return max(1, min(int(most / step), round(1 / step) - 1))


def _images(job: Job, macs: int) -> int:
    """Return how many validation images a model is attacked on: all of them on a GPU."""
    assert job.splits is not None
    assert job.splits.validation is not None
    there = len(job.splits.validation)
    if device_of(job.dense).type != "cpu":
        return there
    least, most = IMAGES
    return min(there, max(least, min(most, CPU_MACS // (3 * PGD_STEPS * max(macs, 1)))))


def _kept_before(job: Job) -> dict[float, Tried]:
    found = kept(job, KEPT)
    if found is None:
        return {}
    with readable_part(job, KEPT):
        return {t.prune_ratio: t for t in map(tried, found["tried"])}


def _line(trial: Tried, settings: Settings) -> str:
    low, high = trial.interval
    told = "within" if trial.within else "beyond"
    return (
        f"ratio {trial.prune_ratio:g}: {100 * trial.drop:+.1f} points lost "
        f"[{100 * low:.1f}, {100 * high:.1f}] on {trial.images} validation images, {told} "
        f"{settings.max_drop:g}"
    )


def _out_of_reach(told: dict[int, Tried], settings: Settings) -> BudgetError:
    if not told:
        return BudgetError("--max-drop: no ratio can be reached; protect fewer layers")
    least = told[min(told)]
    low, high = least.interval
    return BudgetError(
        f"--max-drop {settings.max_drop:g}: already ratio {least.prune_ratio:g} costs "
        f"{100 * least.drop:.1f} points of robust accuracy [{100 * low:.1f}, {100 * high:.1f}] on "
        f"{least.images} validation images; allow more, or name a --ratio"
    )
