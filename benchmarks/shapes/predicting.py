"""What of a pruned model tells how robust it is after fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Predictor:
    """How well a number of a shape, known before fine-tuning, orders the tuned models."""

    name: str
    spearman: float
    p: float
    determination: float  # R^2 of a straight line, left one out


def predictors(known: Mapping[str, Sequence[float]], tuned: Sequence[float]) -> list[Predictor]:
    """Return every number's rank correlation with the tuned accuracy, the strongest first."""
    found = []
    for name, values in known.items():
        ranked = stats.spearmanr(values, tuned)
        line = left_out(np.asarray(values, float)[:, None], np.asarray(tuned, float))
        found.append(Predictor(name, float(ranked.statistic), float(ranked.pvalue), line))
    return sorted(found, key=lambda each: -abs(each.spearman))


def left_out(known: np.ndarray, tuned: np.ndarray, ridge: float = 1e-3) -> float:
    """Return R^2 of a linear fit whose every prediction is made without that model.

    Args:
        known: [models, numbers].
        tuned: [models].
        ridge: in shares of the mean square of the scaled numbers, so that few models and many
            numbers have one answer.
    """
    scaled = (known - known.mean(0)) / np.maximum(known.std(0), 1e-12)
    n, numbers = scaled.shape
    missed = np.empty(n)
    for i in range(n):
        rest = np.arange(n) != i
        mean = tuned[rest].mean()
        x, centre = scaled[rest], scaled[rest].mean(0)
        gram = (x - centre).T @ (x - centre) + ridge * n * np.eye(numbers)
        slopes = np.linalg.solve(gram, (x - centre).T @ (tuned[rest] - mean))
        missed[i] = tuned[i] - mean - (scaled[i] - centre) @ slopes
    spread = tuned - np.array([tuned[np.arange(n) != i].mean() for i in range(n)])
    return 1 - float((missed**2).sum() / (spread**2).sum())
