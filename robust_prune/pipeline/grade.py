"""What a plan was decided on, and what that is worth."""

from __future__ import annotations

from typing import Any

from robust_prune.data import DataSplits

# PGD-20 before fine-tuning, difference to the same with data, in points, where up to half, and
# where more, is removed: the most that any network and seed lost, rounded up
# (benchmarks/records/2026-11-26_without-data, `points` of benchmarks.without_data.cells).
POINTS_AT_HALF, POINTS_BEYOND = 5, 11
GIVE_DATA = (
    "give training images with --data DIR (train/<class>/), or unlabelled pictures of their kind "
    "with --calibration DIR"
)


def grade_of(splits: DataSplits, prune_ratio: float) -> dict[str, Any]:
    """Return what a plan is decided on: source, labels, and in a sentence what to expect.

    Args:
        splits: the images that it is decided on.
        prune_ratio: share of the budget's target that goes.
    """
    points = POINTS_AT_HALF if prune_ratio <= 0.5 else POINTS_BEYOND
    expected, advice = {
        "training data": ("decided on training data", ""),
        "own pictures": (
            "decided on your own pictures with the dense model's verdicts for labels: as good as "
            "with data where they are of the kind the model is for",
            "nothing was measured, because pictures without labels can't tell right from wrong; "
            "--data DIR with labelled test images does",
        ),
        "stand-in photographs": (
            f"decided on stand-ins: expect up to {points} points of robust accuracy less than "
            "with data, before fine-tuning",
            GIVE_DATA,
        ),
    }[splits.origin]
    return {
        "source": splits.origin,
        "labels": "the data's" if splits.labelled else "the dense model's verdicts",
        "available": len(splits.train),
        "grade": expected,
        "advice": advice,
    }
