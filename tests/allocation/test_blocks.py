"""Blocks go whole where that costs less than channels, by the same predicted loss."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from robust_prune.allocation import Problem, narrowest_without, without, worth_removing
from robust_prune.errors import BudgetError
from robust_prune.types import Budget, ChannelGroup, Cost, Curve

WIDTH = 24
NAMES = ("a", "b", "c", "d")
GROUPS = [ChannelGroup(name, WIDTH, 1, 2, (name,), ()) for name in NAMES]


def cost(widths: Mapping[str, int]) -> Cost:
    """A call of 50 for each group that is there at all, and 10 for each channel."""
    each = [widths.get(name, WIDTH) for name in NAMES]
    return Cost(sum(50 * (w > 0) + 10 * w for w in each), sum(each), sum(each))


def problem(ratio: float = 0.5, **more: object) -> Problem:
    return Problem(GROUPS, cost, Budget("macs", ratio), **more)  # type: ignore[arg-type]


def curves(whole: float) -> dict[str, Curve]:
    """Curves by which nearly the whole group costs so much, and half of it half."""
    return {name: Curve(name, (0.5, 1.0), (whole / 2, whole)) for name in NAMES}


def test_a_block_that_costs_nothing_goes() -> None:
    rises = {("a",): 1.0, ("b",): 0.0, ("c",): 1.0}
    assert worth_removing(problem(0.25), curves(1.0), rises) == [("b",)]


def test_blocks_stay_where_channels_cost_less() -> None:
    assert worth_removing(problem(), curves(0.01), {(name,): 1.0 for name in NAMES}) == []


def test_blocks_go_by_what_they_cost_for_what_they_save() -> None:
    rises = {("a", "b"): 0.3, ("c",): 0.2}  # 0.15 for each of the first two
    assert worth_removing(problem(), curves(5.0), rises)[0] == ("a", "b")


def test_the_sum_decides_how_many_go() -> None:
    """The second block costs more than the channels that make up for it, or less."""
    rises = {("a",): 0.0, ("b",): 1.5, ("c",): 1.5}
    assert worth_removing(problem(0.6), curves(1.0), rises) == [("a",)]
    assert worth_removing(problem(0.6), curves(9.0), rises) == [("a",), ("b",)]


def test_no_more_goes_than_is_asked() -> None:
    rises = {("a", "b"): 0.0, ("c",): 0.1}  # half, and a quarter
    assert worth_removing(problem(0.3), curves(9.0), rises) == [("c",)]
    assert worth_removing(problem(0.1), curves(9.0), rises) == []


def test_a_budget_out_of_reach_by_channels_is_met_without_blocks() -> None:
    asked = problem(0.9)
    with pytest.raises(BudgetError):
        asked.check_reach(asked.narrowest)
    gone = worth_removing(asked, curves(1.0), {(name,): 2.0 for name in NAMES})
    left = without(asked, gone)
    left.check_reach(left.narrowest)
    assert len(gone) == 3  # one is left, narrow
    assert worth_removing(problem(0.99), curves(1.0), {("a",): 2.0}) == []


def test_what_is_asked_of_single_layers_is_not_overruled() -> None:
    asked = problem(fixed={"b": 12})
    assert worth_removing(asked, curves(1.0), {("b",): 0.0}) == []
    assert narrowest_without(asked, [("a",), ("b",)])["a"] == 0
    assert narrowest_without(asked, [("a",), ("b",)])["b"] == 12
    with pytest.raises(BudgetError, match="'b' has a width that was asked for"):
        without(asked, [("b",)])


def test_a_width_of_none_is_kept() -> None:
    gone = without(problem(), [("a",)])
    assert gone.narrowest["a"] == gone.widest["a"] == gone.width(GROUPS[0], 0.5) == 0
    assert gone.cost_at(gone.widest) == problem().dense - 50 - 10 * WIDTH
