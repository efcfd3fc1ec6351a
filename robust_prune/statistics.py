"""Shares of images with their intervals, and the test of two models on the same images."""

from __future__ import annotations

import math
from dataclasses import dataclass

from robust_prune.errors import UsageError


@dataclass(frozen=True)
class Proportion:
    """`successes` of `n` images, with a Wilson score interval.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    JASA 22, 1927.
    """

    successes: int
    n: int
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.successes <= self.n or self.n == 0:
            raise UsageError(f"{self.successes} of {self.n} is not a proportion")

    @property
    def value(self) -> float:
        """The share itself, in [0, 1]."""
        return self.successes / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the Wilson interval."""
        from statistics import NormalDist  # its first import costs --help 20 ms

        z = NormalDist().inv_cdf(0.5 + self.confidence / 2)
        p, n = self.value, self.n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return min(max(0.0, centre - half), p), max(min(1.0, centre + half), p)

    def derived(self) -> dict[str, float | tuple[float, float]]:
        """Return what plain data holds beside the counts."""
        return {"value": self.value, "interval": self.interval}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


@dataclass(frozen=True)
class PairedTest:
    """Exact McNemar test of two models on the same images.

    `first_only` images are right for the first model alone, `second_only` for the second alone;
    `p_value` is the two-sided exact binomial probability of so uneven a split.
    Source: Q. McNemar, Psychometrika 12, 1947; exact form as in Fagerland et al., 2013.
    """

    first_only: int
    second_only: int

    @property
    def p_value(self) -> float:
        """Two-sided p-value, 1 where the models never disagree."""
        n = self.first_only + self.second_only
        if n == 0:
            return 1.0
        smaller = min(self.first_only, self.second_only)
        tail = sum(math.exp(_log_choose(n, k) - n * math.log(2)) for k in range(smaller + 1))
        return min(1.0, 2 * tail)

    def derived(self) -> dict[str, float]:
        """Return what plain data holds beside the counts."""
        return {"p_value": self.p_value}


@dataclass(frozen=True)
class PairedDrop:
    """By how much the second of two models is less often right, on the same `n` images.

    The interval is the adjusted Wald interval of a difference of paired proportions.
    Source: A. Agresti and Y. Min, "Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine 24, 2005.
    """

    first_only: int
    second_only: int
    n: int

    @property
    def value(self) -> float:
        """The drop itself, in [-1, 1]."""
        return (self.first_only - self.second_only) / self.n

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Lower and upper end."""
        from statistics import NormalDist  # its first import costs --help 20 ms

        z = NormalDist().inv_cdf(0.5 + confidence / 2)
        b, c, n = self.first_only + 0.5, self.second_only + 0.5, self.n + 2
        centre, half = (b - c) / n, z / n * math.sqrt(b + c - (b - c) ** 2 / n)
        return max(-1.0, centre - half), min(1.0, centre + half)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
