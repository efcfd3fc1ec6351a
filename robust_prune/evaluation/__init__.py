"""Clean and robust accuracy with intervals, on the same images for every model compared."""

from robust_prune.evaluation.images import TestImages, draw, drawn_from, test_images
from robust_prune.evaluation.measuring import (
    ATTACKS,
    PGD_STEPS,
    Attack,
    autoattack_seconds,
    evaluate,
    latency_ms,
)
from robust_prune.evaluation.rounds import FIRST, evaluate_in_rounds, too_wide

__all__ = [
    "ATTACKS",
    "Attack",
    "FIRST",
    "PGD_STEPS",
    "TestImages",
    "autoattack_seconds",
    "draw",
    "drawn_from",
    "evaluate",
    "evaluate_in_rounds",
    "latency_ms",
    "test_images",
    "too_wide",
]
