"""As many test images as a question takes: rounds of more of them, until the interval is narrow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from robust_prune.data import Split
from robust_prune.errors import DataError
from robust_prune.evaluation.images import TestImages, draw
from robust_prune.evaluation.measuring import merged
from robust_prune.statistics import PairedDrop, Proportion
from robust_prune.types import Evaluation

FIRST = 200  # images of the first round; every other round doubles them
CONFIDENCE = 0.95


def evaluate_in_rounds(
    split: Split,
    measure: Callable[[TestImages], Sequence[Evaluation]],
    *,
    margin: float,
    seed: int,
    classes: int = 0,
    name: str = "test",
) -> list[Evaluation]:
    """Judge models on ever more test images until the answer is known to within a margin.

    The answer is the drop of every other model against the first on the same images, or, for one
    model, its accuracy, under the last attack that is measured. The rounds stop where half of its
    95 % interval (of the widest one) is at most the margin, which says nothing of where the
    interval lies: stopping by width does not favour an outcome as stopping by p-value does. Images
    of a round are new; all of them together are those that `draw` gives for as many.

    Args:
        split: of the test images; the rounds end with them at the latest.
        measure: gives for one or more models what they get on some images.
        margin: percentage points.
        seed: of the draw.
        classes: of the data, 0 where it is not known.
        name: of the split.

    Returns:
        What each model gets on the images of all rounds.
    """
    if len(split) == 0:
        raise DataError("the test split holds no images")
    found: list[Evaluation] = []
    begin, end = 0, min(FIRST, len(split))
    while True:
        part = draw(split, end - begin, seed, name=name, begin=begin)
        fresh = measure(replace(part, classes=classes or part.classes))
        found = [joined(*both) for both in zip(found, fresh, strict=True)] if found else [*fresh]
        if half_width(found) <= margin or end == len(split):
            return found
        begin, end = end, min(2 * end, len(split))


def too_wide(found: Sequence[Evaluation], margin: float) -> str:
    """Return a line where the images ended before the answer was known to within the margin."""
    half = half_width(found)
    if half <= margin:
        return ""
    what = ("the accuracy", "the drop", "every drop")[min(len(found), 3) - 1]
    return (
        f"all {found[0].n} test images tell {what} to within {half:.1f} percentage points, not the "
        f"{margin:g} that were asked for"
    )


def half_width(found: Sequence[Evaluation]) -> float:
    """Return half of the 95 % interval of what rounds are to tell, in percentage points."""
    first, *others = (evaluation.measurements[-1].correct for evaluation in found)
    if others:
        intervals = [_drop(first, other).interval(CONFIDENCE) for other in others]
    else:
        intervals = [Proportion(sum(first), len(first), CONFIDENCE).interval]
    return max(50 * (high - low) for low, high in intervals)


def _drop(first: Sequence[bool], second: Sequence[bool]) -> PairedDrop:
    pairs = list(zip(first, second, strict=True))
    first_only = sum(a and not b for a, b in pairs)
    second_only = sum(b and not a for a, b in pairs)
    return PairedDrop(first_only, second_only, len(pairs))


def joined(first: Evaluation, second: Evaluation) -> Evaluation:
    """Return one model's evaluation on the images of both."""
    pairs = zip(first.measurements, second.measurements, strict=True)
    both = tuple(merged((a, b), (*a.correct, *b.correct), a.seconds + b.seconds) for a, b in pairs)
    return replace(first, n=first.n + second.n, measurements=both)
