"""Clean and robust accuracy with intervals, on the same images for every model compared."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robust_prune.adversaries import autoattack, pgd_verdicts
from robust_prune.distributed import ALONE, Processes
from robust_prune.errors import UsageError
from robust_prune.evaluation.images import TestImages, test_images
from robust_prune.graph import count_cost
from robust_prune.modules import (
    as_memory_allows,
    check_float32,
    check_outputs,
    contiguous,
    device_of,
    evaluating,
    images_in_free_memory,
    predict,
    requires_grad,
    seeded,
    telling_of_memory,
)
from robust_prune.statistics import Proportion
from robust_prune.types import Evaluation, Measurement, ThreatModel

Attack = Literal["none", "pgd", "autoattack"]
ATTACKS: tuple[Attack, ...] = ("none", "pgd", "autoattack")
PGD_STEPS = 20
Progress = Callable[[str], None]


def evaluate(
    model: nn.Module,
    data_: Any,
    *,
    threat: ThreatModel | None = None,
    attack: Attack = "autoattack",
    n: int = 1000,
    seed: int = 0,
    batch_size: int = 100,
    processes: Processes = ALONE,
    done: Sequence[Measurement] = (),
    on_measured: Callable[[Measurement], None] | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Measure clean accuracy, PGD-20 and AutoAttack accuracy.

    Args:
        model: takes images in [0, 1] and gives logits; left as it was.
        data_: TestImages, or a data set name or folder (its test split is used), a loader, or an
            iterable of (images, labels), used as they are.
        threat: default Linf 8/255.
        attack: `none` measures clean accuracy only, `pgd` adds PGD-20, `autoattack` adds both.
        n: images to draw.
        seed: of the draw and of every attack; global random state is restored.
        batch_size: images at a time; AutoAttack's result depends on it.
        processes: each attacks its share of the images.
        done: measurements of the same model and images that need not be made again.
        on_measured: called with each new measurement.
        on_progress: called with a line now and then.

    Returns:
        One Measurement per attack, each with the verdict for every image.
    """
    if attack not in ATTACKS:
        raise UsageError(f"attack {attack!r} is not known; use one of {', '.join(ATTACKS)}")
    threat = ThreatModel.checked(threat)
    check_float32(model)
    model = contiguous(model)
    test = test_images(model, data_, n, seed)
    check_outputs(model, test.images, test.labels, test.classes or None)
    report = on_progress or (lambda line: None)
    share = _share(test, processes)
    makers: dict[str, Callable[[], Measurement]] = {
        "clean": lambda: _clean(model, share, batch_size),
        "pgd": lambda: _pgd(model, share, threat, seed, batch_size),
        "autoattack": lambda: _autoattack(model, share, threat, seed, batch_size, on_progress),
    }
    names = ("clean", "pgd", "autoattack")[: 1 + ATTACKS.index(attack)]
    labels = {"pgd": f"PGD-{PGD_STEPS}", "autoattack": "AutoAttack"}
    found = {measurement.attack: measurement for measurement in done}
    fit = functools.partial(images_in_free_memory, model, test.images[:1])
    with evaluating(model), requires_grad(model, False):
        for name in names:
            if name in found:
                continue
            if name in labels:
                report(f"{labels[name]} on {len(test.labels)} images")
            with seeded(seed), telling_of_memory(report, fit) as lines:
                part = makers[name]()
                if lines:
                    part = replace(part, details={**part.details, "memory": lines})
                found[name] = _joined(part, processes, len(test.labels))
            if on_measured is not None:
                on_measured(found[name])
        channels, height, width = test.images.shape[1:]
        cost = count_cost(model, (channels, height, width))
        latency = latency_ms(model, test.images[:32])
    return Evaluation(
        split=test.split,
        n=len(test.labels),
        seed=seed,
        threat=threat,
        measurements=tuple(found[name] for name in names),
        cost=cost,
        latency_ms=latency,
    )


def _share(test: TestImages, processes: Processes) -> TestImages:
    """Return every n-th image of this process; all of them where there are fewer than processes."""
    if len(test.labels) < processes.size:
        return test
    own = slice(processes.rank, None, processes.size)
    return replace(test, images=test.images[own], labels=test.labels[own])


def _joined(part: Measurement, processes: Processes, n: int) -> Measurement:
    """Put the shares of all processes together again."""
    if processes.size == 1 or n < processes.size:
        return part
    parts = processes.gathered([part])
    correct = [False] * n
    for rank, share in enumerate(parts):
        correct[rank :: processes.size] = share.correct
    whole = merged(parts, correct, max(p.seconds for p in parts))
    return replace(whole, details={**whole.details, "processes": processes.size})


def merged(parts: Sequence[Measurement], correct: Sequence[bool], seconds: float) -> Measurement:
    """Return one measurement of those of one model by one attack on parts of the images.

    Args:
        parts: at least one.
        correct: the verdicts of all, image by image.
        seconds: what they took together.
    """
    details = dict(parts[0].details)
    if "robust_after" in details:
        names = dict.fromkeys(name for p in parts for name in p.details["robust_after"])
        details["robust_after"] = {
            name: sum(p.details["robust_after"].get(name, 0) for p in parts) for name in names
        }
    if memory := [line for p in parts for line in p.details.get("memory", ())]:
        details["memory"] = list(dict.fromkeys(memory))
    flags = list(dict.fromkeys(flag for p in parts for flag in p.flags))
    if "without_gradient" in details:
        details["without_gradient"] = sum(p.details["without_gradient"] for p in parts)
        flags = _masked(details["without_gradient"], len(correct))
    return replace(
        parts[0],
        correct=tuple(correct),
        accuracy=Proportion(sum(correct), len(correct)),
        details=details,
        flags=tuple(flags),
        seconds=seconds,
    )


@torch.no_grad()
def latency_ms(model: nn.Module, images: Tensor, repeats: int = 10) -> float:
    """Return the median milliseconds of one forward pass over these images."""
    images = images.to(device_of(model))

    def measured(size: int) -> float:
        times = []
        for i in range(repeats + 2):
            _synchronize(images.device)
            start = time.perf_counter()
            for part in torch.split(images, size):
                model(part)
            _synchronize(images.device)
            if i >= 2:
                times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times)

    with evaluating(model):
        return as_memory_allows(measured, len(images), "the latency")


def autoattack_seconds(model: nn.Module, images: Tensor, classes: int, robust: float) -> float:
    """Estimate the seconds AutoAttack takes, from one forward and backward pass.

    APGD-CE makes 100 passes on all images that are right; targeted APGD and FAB 100 passes for
    each of up to 9 classes, and Square 5,000 forward passes, on those that survive.
    """

    def seconds_of_an_image(size: int) -> float:
        sample = images[:size].to(device_of(model)).requires_grad_(True)
        model(sample).sum().backward()
        _synchronize(sample.device)
        start = time.perf_counter()
        model(sample).sum().backward()
        _synchronize(sample.device)
        return (time.perf_counter() - start) / len(sample)

    with evaluating(model), requires_grad(model, False):
        both = as_memory_allows(seconds_of_an_image, min(64, len(images)), "an estimate")
    targets = min(9, max(1, classes - 1))
    passes = 100 + robust * (100 * targets + 2 * 100 * targets + 0.42 * 5000)
    return passes * both * len(images)


def _clean(model: nn.Module, test: TestImages, batch_size: int) -> Measurement:
    start = time.perf_counter()
    correct = predict(model, test.images, batch_size) == test.labels
    return _measurement("clean", correct, start)


def _pgd(
    model: nn.Module, test: TestImages, threat: ThreatModel, seed: int, batch_size: int
) -> Measurement:
    start = time.perf_counter()
    correct, blind = pgd_verdicts(
        model,
        test.images,
        test.labels,
        threat=threat,
        steps=PGD_STEPS,
        seed=seed,
        batch_size=batch_size,
    )
    details = {
        "steps": PGD_STEPS,
        "step_size": threat.eps / 4,
        "restarts": 1,
        "counts": "any iterate",
        "without_gradient": int(blind.sum()),
    }
    return _measurement("pgd", correct, start, details, _masked(int(blind.sum()), len(blind)))


def _masked(blind: int, n: int) -> list[str]:
    """Return the flag of a measurement by gradients that some images did not have."""
    if not blind:
        return []
    return [
        f"masked gradients: {blind} of {n} images had none, so that PGD could not attack them and "
        "its accuracy is only an upper bound; AutoAttack's Square needs no gradient"
    ]


def _autoattack(
    model: nn.Module,
    test: TestImages,
    threat: ThreatModel,
    seed: int,
    batch_size: int,
    on_progress: Progress | None,
) -> Measurement:
    start = time.perf_counter()
    result = autoattack(
        model,
        test.images,
        test.labels,
        threat=threat,
        seed=seed,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    details = {
        "version": "standard",
        "attacks": list(result.attacks),
        "robust_after": result.robust_after,
        "batch_size": result.batch_size,
    }
    return _measurement("autoattack", result.robust, start, details, result.flags)


def _measurement(
    attack: str,
    correct: Tensor,
    start: float,
    details: dict[str, Any] | None = None,
    flags: Sequence[str] = (),
) -> Measurement:
    verdicts = tuple(bool(v) for v in correct.tolist())
    return Measurement(
        attack=attack,
        accuracy=Proportion(sum(verdicts), len(verdicts)),
        correct=verdicts,
        details=details or {},
        flags=tuple(flags),
        seconds=time.perf_counter() - start,
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
