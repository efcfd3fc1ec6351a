"""The ideas: each gives a pruned model that has seen as many images as the plain way's."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from benchmarks.criteria.dense import digest
from benchmarks.criteria.protocol import percent
from benchmarks.ideas.methods import own_augmentations, teacher_both
from benchmarks.ideas.supernet import Narrowed, TrainAtWidths, losses
from benchmarks.matrix.levels import DENSE, OURS, Tuning
from benchmarks.matrix.one import One
from benchmarks.matrix.work import pruned, rate_of, tune_
from benchmarks.shapes.drawing import at_random
from benchmarks.shapes.telling import read as read_shapes
from robust_prune.adversaries import adversarial_loss, adversarial_set
from robust_prune.allocation import (
    Problem,
    allocate,
    allocate_by_capacity,
    allocate_evenly,
    candidate_widths,
)
from robust_prune.graph import ModelGraph
from robust_prune.modules import ImageModel, copied, seeded
from robust_prune.pipeline import run
from robust_prune.types import Budget

BASE, PEER = "pruned", "torch-pruning"
SUPERNET_SHARES = 0.75, 0.5, 0.35, 0.25  # of the multiply-adds, that its narrower plans leave
DRAWN = 60  # random plans that a supernet is asked about
SEARCHED, PARENTS, MUTATION = 48, 4, 0.25  # models judged, kept to change, how far (log width)
JUDGED = 512  # training images that judge them
CLIMBS = 1000  # steps towards the widths that a fit calls best


@dataclass(frozen=True)
class Subject(One):
    """With the fine-tuning that every idea has."""

    tuning: Tuning
    record: Path | None  # of benchmarks.shapes, that widths are fitted on

    def pruned(self, arm: str = OURS) -> ImageModel:
        """Return the model of an arm of the matrix, not tuned."""
        with seeded(self.key.seed):
            return pruned(self.bench, replace(self.key, arm=arm), self.dense, self.splits)

    def tune(self, model: ImageModel, epochs: int = 0, **changed: Any) -> ImageModel:
        """Fine-tune in place by the matrix's recipe, with another method or teacher."""
        tuning = replace(self.tuning, epochs=epochs or self.tuning.epochs)
        if not tuning.epochs:
            return model
        tune_(self.bench, self.key, tuning, model, self.splits, **changed)
        return model


def as_it_is(subject: Subject) -> ImageModel:
    """Tune what `compress` makes."""
    return subject.tune(subject.pruned())


def peer(subject: Subject) -> ImageModel:
    """Tune what torch-pruning's L2 norm makes."""
    return subject.tune(subject.pruned("tp-l2-local"))


def disturbed(subject: Subject) -> ImageModel:
    """Disturb weights in fine-tuning (AWP)."""
    return subject.tune(subject.pruned(), method="pgd-at+awp")


def better_teacher(subject: Subject, arm: str = OURS) -> ImageModel:
    """Learn from the dense model that had the same fine-tuning, on clean and attacked images."""
    name = f"{digest(subject.dense)}-{subject.tuning.epochs}-{subject.key.seed}.pt"
    path = subject.bench.cache / "teachers" / name
    teacher = copied(subject.dense)
    if path.exists():
        teacher.load_state_dict(torch.load(path, weights_only=True))
    else:
        subject.tune(teacher)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(teacher.state_dict(), path)
    return subject.tune(subject.pruned(arm), method=teacher_both, teacher=teacher)


def dense_teacher(subject: Subject) -> ImageModel:
    """Learn from the dense model as it is, on clean and attacked images."""
    return subject.tune(subject.pruned(), method=teacher_both, teacher=subject.dense)


def more_data(subject: Subject) -> ImageModel:
    """Mix in augmented images that the dense model is sure of."""
    return subject.tune(subject.pruned(), method=own_augmentations, teacher=subject.dense)


def in_steps(subject: Subject) -> ImageModel:
    """Prune in three steps during the same number of epochs."""
    tuning = subject.tuning
    settings = replace(
        subject.settings,
        finetune=subject.key.method,
        epochs=tuning.epochs,
        prune_steps=3,
        attack_steps=tuning.steps,
        lr=rate_of(subject.bench, subject.key, tuning),
    )
    with seeded(subject.key.seed):
        found = run(subject.dense, subject.splits, settings).model
    assert isinstance(found, ImageModel)
    return found


def fitted_widths(subject: Subject) -> ImageModel:
    """Take the widths that a fit on tuned shapes of this network calls best (validation images).

    The tuned accuracy of a record of `benchmarks.shapes` is fitted by the sum of slopes, none
    below zero, times log widths; free slopes send some groups to their least width.
    """
    if subject.record is None:
        raise SystemExit("the idea `fitted` needs --shapes, a record of benchmarks.shapes")
    tuned = [s for s in read_shapes(subject.record) if s.name != DENSE]
    names = sorted(tuned[0].widths)
    logs = np.log([[s.widths[n] for n in names] for s in tuned])
    worth = np.array([percent(s.validation) for s in tuned])
    slopes, _ = nnls(logs - logs.mean(0), worth - worth.mean())
    grounds = subject.grounds()
    problem, curves = grounds.problem, grounds.curves

    def value(widths: dict[str, int]) -> float:
        return float(slopes @ np.log([widths[n] for n in names]))

    best = max((*candidate_widths(problem, curves), allocate_by_capacity(problem)), key=value)
    draw = random.Random(subject.key.seed)
    for _ in range(CLIMBS):
        best = max(best, changed(problem, best, draw), key=value)
    print(f"fitted: {dict(zip(names, slopes.round(2), strict=True))}, {best}")
    return subject.tune(subject.by_plan(grounds.plan(best, "fitted")))


def supernet(subject: Subject) -> ImageModel:
    """Train a copy at many widths for half of the epochs, and tune those that it says are best."""
    grounds = subject.grounds()
    problem, curves = grounds.problem, grounds.curves
    model = copied(subject.dense)
    narrowed = Narrowed(model, ModelGraph(model, subject.splits.input_size), grounds.scores)
    draw = random.Random(subject.key.seed)
    trained = [{g.name: g.width for g in problem.groups}]
    for share in SUPERNET_SHARES:
        wider = replace(problem, budget=Budget("macs", 1 - share))
        trained += [allocate_evenly(wider), allocate_by_capacity(wider)]
        trained += [at_random(wider, draw) for _ in range(4)]
    half = subject.tuning.epochs // 2
    subject.tune(model, half, method=TrainAtWidths(narrowed, trained, subject.key.seed))
    asked = {"even": allocate_evenly(problem), "capacity": allocate_by_capacity(problem)}
    asked |= {f"curve-{i}": w for i, w in enumerate(candidate_widths(problem, curves))}
    asked |= {f"random-{i}": at_random(problem, draw) for i in range(DRAWN)}
    assert subject.splits.validation is not None
    known = subject.splits.validation.take(512, 0)
    told = losses(narrowed, asked, known, subject.settings.threat)
    best = min(told, key=lambda name: told[name])
    print(f"supernet: {best} of {len(told)}, {sorted(told.items(), key=lambda i: i[1])[:8]}")
    return subject.tune(subject.by_plan(grounds.plan(asked[best], "supernet")))


def searched(subject: Subject) -> ImageModel:
    """Search widths by the adversarial loss of the model they make, before any fine-tuning."""
    grounds = subject.grounds()
    problem, curves = grounds.problem, grounds.curves
    draw = random.Random(subject.key.seed)
    threat = subject.settings.threat
    known = subject.splits.train.take(JUDGED, subject.key.seed + 100)
    losses: dict[tuple[tuple[str, int], ...], float] = {}

    def judged(widths: dict[str, int]) -> None:
        name = tuple(sorted(widths.items()))
        if name not in losses:
            model = subject.by_plan(grounds.plan(widths, "searched"))
            attacked = adversarial_set(model, *known, threat=threat, seed=0)
            losses[name] = adversarial_loss(model, attacked)

    for widths in (*candidate_widths(problem, curves), allocate_by_capacity(problem)):
        judged(widths)
    told = [min(losses.values())]
    while len(losses) < SEARCHED:
        parent = dict(draw.choice(sorted(losses, key=losses.__getitem__)[:PARENTS]))
        judged(changed(problem, parent, draw))
        told.append(min(losses.values()))
    print(f"searched: {[round(loss, 4) for loss in told]}")
    best = dict(min(losses.items(), key=lambda judged: judged[1])[0])
    return subject.tune(subject.by_plan(grounds.plan(best, "searched")))


IDEAS: dict[str, Callable[[Subject], ImageModel]] = {
    BASE: as_it_is,
    PEER: peer,
    "awp": disturbed,
    "teacher": better_teacher,
    "teacher-dense": dense_teacher,
    f"{PEER}-teacher": partial(better_teacher, arm="tp-l2-local"),
    "augmentations": more_data,
    "steps": in_steps,
    "fitted": fitted_widths,
    "supernet": supernet,
    "searched": searched,
}


def changed(problem: Problem, widths: dict[str, int], draw: random.Random) -> dict[str, int]:
    """Return widths at the budget near others."""
    goes = {
        g.name: 1 - min(1.0, widths[g.name] / g.width * math.exp(draw.gauss(0, MUTATION)))
        for g in problem.groups
    }
    return allocate(problem, {name: max(share, 1e-3) for name, share in goes.items()})
