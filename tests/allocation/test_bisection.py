"""Finding the ratio of another pruner: the closest of its steps, or what is possible."""

from __future__ import annotations

import bisect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_prune.allocation import ratio_for
from robust_prune.errors import BudgetError
from robust_prune.types import Budget


@given(st.lists(st.floats(0.01, 0.95), min_size=1, max_size=40, unique=True), st.floats(0.02, 0.9))
def test_the_closest_step_is_found(heights: list[float], asked: float) -> None:
    shares = [0.0, *sorted(heights)]  # at ratios in equal steps

    def reached(ratio: float) -> float:
        return shares[min(int(ratio * len(shares)), len(shares) - 1)]

    if shares[-1] < asked - 0.002:
        with pytest.raises(BudgetError, match=f"at most {100 * shares[-1]:.1f} %"):
            ratio_for(Budget("macs", asked), reached)
        return
    ratio, share = ratio_for(Budget("macs", asked), reached)
    assert share == reached(ratio)
    above = bisect.bisect_left(shares, asked)
    around = shares[max(above - 1, 0) : above + 1]
    best = min(abs(s - asked) for s in around)
    assert abs(share - asked) <= max(best, 0.002) + 1e-12


def test_a_ratio_that_is_close_enough_ends_the_search() -> None:
    tried: list[float] = []

    def reached(ratio: float) -> float:
        tried.append(ratio)
        return ratio

    assert ratio_for(Budget("params", 0.5), reached) == (0.5, 0.5)
    assert tried == [1.0, 0.5]
