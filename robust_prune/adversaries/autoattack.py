"""AutoAttack through pyautoattack, with its verdicts unchanged and its side effects undone."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from robust_prune.adversaries.hyperplanes import spare_sorting_
from robust_prune.adversaries.quick import quick
from robust_prune.errors import AttackError
from robust_prune.modules import (
    as_memory_allows,
    device_of,
    evaluating,
    predict,
    requires_grad,
    seeded,
)
from robust_prune.types import ThreatModel

NORMS = {"linf": "Linf", "l2": "L2"}


@dataclass(frozen=True)
class AutoAttackResult:
    """AutoAttack's verdict image by image.

    `robust` [N] is true where the label survived every attack and the returned image too;
    `robust_after` counts the survivors after each attack; `flags` are its own warnings;
    `batch_size` is smaller than asked for where memory did not suffice.
    """

    robust: Tensor
    images: Tensor
    attacks: tuple[str, ...]
    robust_after: dict[str, int]
    flags: tuple[str, ...]
    batch_size: int


def autoattack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    seed: int,
    batch_size: int = 250,
    stand_in: bool = True,
    attacks: Sequence[str] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> AutoAttackResult:
    """Run AutoAttack's standard version: APGD-CE, targeted APGD, targeted FAB, Square.

    Args:
        model: gives logits [N, K]; put into eval mode for the run.
        images: [N, C, H, W] in [0, 1].
        labels: [N].
        threat: norm and eps.
        seed: for every attack; AutoAttack reseeds per batch, so results depend on `batch_size`.
        batch_size: images at a time.
        stand_in: attack a quicker copy where one is proven (see `quick`), with FAB's Linf steps
            found without sorting: both differ by rounding from what they stand for, which can turn
            a verdict only where an image is just broken, or just not. Without, images are
            pyautoattack's own, bit for bit.
        attacks: run these alone, by AutoAttack's names; `square` needs no gradient.
        on_progress: called with a line for each batch an attack finished.

    With K classes at most K - 1 targets exist; below 4 classes the targeted DLR loss is not
    defined and targeted APGD is left out. Both are said in `flags`.

    In the end the model itself judges: an image is robust where no attack counted it as fooled,
    which is then returned as it was, and the model is right on it.

    Raises:
        AttackError: fewer than two classes, logits that are not finite, or images too small.

    Source: Croce and Hein, ICML 2020, arXiv 2003.01690. Deviation: a returned image that fools
    the model when scored again counts as fooling even where AutoAttack's own count missed it.
    """
    if threat.norm == "l2" and min(images.shape[2:]) < 5:
        raise AttackError(
            f"AutoAttack's Square needs images of at least 5 pixels a side for l2, not "
            f"{images.shape[2]}x{images.shape[3]}"
        )
    run = functools.partial(
        _run, model, images, labels, threat, seed, stand_in, attacks, on_progress
    )
    with evaluating(model), requires_grad(model, False), _keep_trace():
        return as_memory_allows(run, batch_size, "AutoAttack", "its draws depend on that")


def _run(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    seed: int,
    stand_in: bool,
    attacks: Sequence[str] | None,
    on_progress: Callable[[str], None] | None,
    batch_size: int,
) -> AutoAttackResult:
    """Run it from the start, with so many images at a time."""
    device = device_of(model)
    with seeded(seed):
        classes = _classes(model, images[:2].to(device))
        attacked = quick(model, images) if stand_in else model
        attack = AutoAttack(
            attacked, norm=NORMS[threat.norm], eps=threat.eps, seed=seed, device=device
        )
        if stand_in:
            spare_sorting_(attack.fab)
        flags = _fit_to_classes(attack, classes)
        if attacks is not None:
            attack.attacks_to_run, flags = list(attacks), []
        watcher = _Watcher(on_progress)
        attack.logger = watcher.logger
        attack.apgd.logger = attack.apgd_targeted.logger = watcher.logger
        adversarial, predicted = attack.run_standard_evaluation(
            images, labels, batch_size=batch_size
        )
        again = predict(model, adversarial, batch_size)
    robust = (predicted.cpu() == labels.cpu()) & (again == labels.cpu())
    return AutoAttackResult(
        robust=robust,
        images=adversarial,
        attacks=tuple(attack.attacks_to_run),
        robust_after=watcher.robust_after(len(images)),
        flags=(*flags, *watcher.warnings),
        batch_size=batch_size,
    )


@torch.no_grad()
def _classes(model: nn.Module, images: Tensor) -> int:
    logits = model(images)
    if not torch.isfinite(logits).all():
        raise AttackError("the model gives logits that are not finite; AutoAttack can't judge it")
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise AttackError(f"AutoAttack needs logits [N, K] with K >= 2, not {list(logits.shape)}")
    return int(logits.shape[1])


def _fit_to_classes(attack: AutoAttack, classes: int) -> list[str]:
    """Cap the number of target classes, which pyautoattack leaves at 9 and then fails on."""
    targets = min(9, classes - 1)
    attack.apgd_targeted.n_target_classes = targets
    attack.fab.n_target_classes = targets
    flags = []
    if targets < 9:
        flags.append(f"{classes} classes: targeted attacks aim at {targets} classes instead of 9")
    if classes < 4:
        attack.attacks_to_run = [name for name in attack.attacks_to_run if name != "apgd-t"]
        flags.append(f"{classes} classes: apgd-t is left out, its loss needs 4 classes")
    return flags


@contextlib.contextmanager
def _keep_trace() -> Iterator[None]:
    """pyautoattack sets the trace function to None, which ends coverage and debuggers."""
    trace = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(trace)


class _Watcher:
    """A logger that keeps AutoAttack's warnings and passes its progress on."""

    def __init__(self, on_progress: Callable[[str], None] | None) -> None:
        self.warnings: list[str] = []
        self._shares: dict[str, float] = {}
        self._on_progress = on_progress
        self.logger = logging.Logger("robust_prune.autoattack", level=logging.DEBUG)
        handler = logging.Handler()
        handler.emit = self._emit  # type: ignore[method-assign]
        self.logger.addHandler(handler)

    def _emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.WARNING:
            flag = message.replace(" See flags_doc.md for details.", "")
            if "target classes" not in flag and flag not in self.warnings:
                self.warnings.append(flag)
            return
        if message.startswith("robust accuracy after "):
            name, share = message.removeprefix("robust accuracy after ").split(": ")
            self._shares[name.lower()] = float(share.split("%")[0]) / 100
        if self._on_progress is not None and (" - " in message or "after" in message):
            self._on_progress(message)

    def robust_after(self, n: int) -> dict[str, int]:
        return {name: round(share * n) for name, share in self._shares.items()}
