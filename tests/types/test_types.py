"""Plain data: intervals, paired tests, threat models and plans."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from robust_prune.errors import PlanError, UsageError
from robust_prune.graph import ModelGraph
from robust_prune.statistics import PairedTest, Proportion
from robust_prune.types import PruningPlan, ThreatModel, parse_eps, to_plain
from tests.conftest import tiny_resnet
from tests.graph.test_graph import random_plan


@given(st.integers(1, 5000), st.floats(0, 1))
def test_wilson_interval_is_scipys(n: int, share: float) -> None:
    proportion = Proportion(round(share * n), n)
    expected = stats.binomtest(proportion.successes, n).proportion_ci(method="wilson")
    assert proportion.interval == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_scipys_exact_binomial_test(first: int, second: int) -> None:
    expected = 1.0 if first + second == 0 else stats.binomtest(first, first + second).pvalue
    assert PairedTest(first, second).p_value == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_eps_is_read_as_people_write_it() -> None:
    assert parse_eps("8/255") == 8 / 255
    assert parse_eps(" 0.5 ") == 0.5
    assert str(ThreatModel.linf("8/255")) == "linf 8/255"
    assert str(ThreatModel.l2(0.5)) == "l2 0.5"
    for wrong in ("8/0", "x", "-1", "nan", "0"):
        with pytest.raises(UsageError):
            parse_eps(wrong)
    with pytest.raises(UsageError, match="8/255"):
        ThreatModel.linf(8)


def a_plan() -> PruningPlan:
    return random_plan(ModelGraph(tiny_resnet(), (3, 32, 32)), 0.5)


def test_a_plan_survives_json_exactly() -> None:
    plan = a_plan()
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest
    assert plan.diff(again) == []


def test_plans_can_be_compared() -> None:
    plan = a_plan()
    first = plan.groups[0]
    other = dataclasses.replace(
        plan,
        groups=(dataclasses.replace(first, keep=tuple(range(first.width))), *plan.groups[1:]),
    )
    assert plan.diff(other) == [
        f"{first.name}: {first.keep_width} against {first.width} channels, {first.keep_width} of "
        "them the same"
    ]
    assert plan.digest != other.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="other/9"), "schema"),
        (lambda d: d.pop("groups"), "malformed"),
        (lambda d: d["groups"][0].update(keep=[3, 1]), "rising order"),
        (lambda d: d["groups"][0].update(keep=[]), "keep 1 to"),
        (lambda d: d["groups"][0].update(keep=[1, 1]), "different channels"),
        (lambda d: d.update(blocks=["one", "one"]), "named twice"),
        (lambda d: d.update(blocks=["other"]) or d["groups"][0].update(keep=[]), "keep 1 to"),
        (lambda d: d["groups"][0].update(keep=[0, 10_000]), "below"),
        (lambda d: d["budget"].update(prune_ratio=2), "between 0 and 1"),
    ],
)
def test_malformed_plans_are_refused(change: object, message: str) -> None:
    data = json.loads(a_plan().to_json())
    change(data)  # type: ignore[operator]
    with pytest.raises((PlanError, UsageError), match=message):
        PruningPlan.from_json(json.dumps(data))


def test_plain_data_is_json() -> None:
    json.dumps(to_plain(a_plan()), allow_nan=False)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 40, 200, 777])
def test_intervals_hold_their_own_value_at_none_and_all(n: int) -> None:
    for successes in (0, 1, n):
        low, high = Proportion(successes, n).interval
        assert 0 <= low <= successes / n <= high <= 1
