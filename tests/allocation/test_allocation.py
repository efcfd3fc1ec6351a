"""Allocation: budgets are met, rules order the groups as they say, infeasible ones are errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_prune.allocation import (
    MAX_PRUNE_RATIO,
    RULES,
    SPREAD,
    Problem,
    allocate,
    allocate_evenly,
    group_weights,
    make_plan,
)
from robust_prune.errors import BudgetError, UsageError
from robust_prune.graph import ModelGraph
from robust_prune.types import Budget
from tests.conftest import tiny_resnet
from tests.graph.test_tracing import build

WIDE = ModelGraph(tiny_resnet(channels=[32, 64, 96, 128], stem_width=16), (3, 32, 32))
NAMES = [group.name for group in WIDE.groups]


def problem(budget: Budget, **limits: Any) -> Problem:
    return Problem(WIDE.groups, WIDE.cost, budget, **limits)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(RULES),
    st.sampled_from(["macs", "params", "channels"]),
    st.floats(0.05, 0.6),
    st.lists(st.floats(1e-3, 10), min_size=len(NAMES), max_size=len(NAMES)),
)
def test_every_rule_meets_every_budget_within_a_point(
    rule: str, target: str, ratio: float, values: list[float]
) -> None:
    budget = Budget(target, ratio)  # type: ignore[arg-type]
    willingness = group_weights(rule, dict(zip(NAMES, values, strict=True)))
    widths = allocate(problem(budget), willingness)
    removed = 1 - WIDE.cost(widths).of(budget.target) / WIDE.cost().of(budget.target)
    assert removed == pytest.approx(ratio, abs=0.01)
    for group in WIDE.groups:
        assert group.min_width <= widths[group.name] <= group.width


def test_weights_by_hand() -> None:
    mrs = {"a": 0.01, "b": 0.1, "c": 1.0}
    assert group_weights("mrs", mrs) == pytest.approx(
        {"a": 1.0, "b": 1 - SPREAD / 2, "c": 1 - SPREAD}
    )
    assert group_weights("inverted", mrs) == pytest.approx(
        {"a": 1 - SPREAD, "b": 1 - SPREAD / 2, "c": 1.0}
    )
    assert group_weights("uniform", mrs) == dict.fromkeys(mrs, 1.0)
    assert group_weights("mrs", {"a": 0.0, "b": 0.0}) == {"a": 1.0, "b": 1.0}


def test_sensitive_groups_lose_less_and_inverted_turns_it_round() -> None:
    mrs = {name: float(i + 1) for i, name in enumerate(NAMES)}
    budget = Budget("macs", 0.5)

    def ratios(rule: str) -> list[float]:
        widths = allocate(problem(budget), group_weights(rule, mrs))
        return [1 - widths[g.name] / g.width for g in WIDE.groups]

    assert ratios("mrs")[0] > ratios("mrs")[-1]
    assert ratios("inverted")[0] < ratios("inverted")[-1]
    assert max(ratios("uniform")) - min(ratios("uniform")) < 0.07


def test_an_infeasible_budget_says_what_is_possible() -> None:
    with pytest.raises(BudgetError, match=r"at most 9\d\.\d % can go.*--ratio 0\.9") as caught:
        allocate_evenly(problem(Budget("macs", 0.9999)))
    possible = float(str(caught.value).split("--ratio ")[1].split(" ")[0])
    widths = allocate_evenly(problem(Budget("macs", possible)))
    assert 1 - WIDE.cost(widths).macs / WIDE.cost().macs == pytest.approx(possible, abs=0.01)
    assert all(widths[g.name] >= math.floor(g.width * (1 - MAX_PRUNE_RATIO)) for g in WIDE.groups)


def test_unknown_rules_and_ratios_are_errors() -> None:
    with pytest.raises(UsageError, match="rule 'best'"):
        group_weights("best", {"a": 1.0})
    for ratio in (0.0, 1.0, -0.1, 50):
        with pytest.raises(UsageError, match="between 0 and 1"):
            Budget("macs", ratio)


def test_the_best_scored_channels_stay_and_equal_ones_keep_the_earlier() -> None:
    name, groups = NAMES[0], WIDE.groups
    width = groups[0].width
    rising = {g.name: [float(i) for i in range(g.units)] for g in groups}
    equal = {g.name: [1.0] * g.units for g in groups}
    widths = {g.name: g.width // 2 for g in groups}
    for scores, expected in ((rising, range(width // 2, width)), (equal, range(width // 2))):
        plan = make_plan(
            problem(Budget("macs", 0.5)),
            widths,
            scores,
            allocation="uniform",
            score="given",
            seed=0,
            input_size=(3, 32, 32),
        )
        assert plan.group(name).keep == tuple(expected)
        assert any("groups are too narrow" in note for note in plan.notes)  # the miss is told


@pytest.mark.parametrize("round_to", [4, 8, 16])
def test_widths_are_rounded_where_a_group_is_wide_enough(round_to: int) -> None:
    budget = Budget("macs", 0.5)
    widths = allocate_evenly(problem(budget, round_to=round_to))
    for group in WIDE.groups:
        width = widths[group.name]
        assert width % round_to == 0 or width == group.width
    assert len({widths[n] for n in NAMES}) > 2
    removed = 1 - WIDE.cost(widths).macs / WIDE.cost().macs
    assert removed == pytest.approx(0.5, abs=0.05)


def test_rounding_keeps_the_blocks_of_heads() -> None:
    vit, size = build("vit_tiny_patch16_224")
    graph = ModelGraph(vit, size)
    widths = allocate_evenly(Problem(graph.groups, graph.cost, Budget("macs", 0.4), round_to=8))
    heads = widths["blocks.0.attn.qkv"]
    assert heads % 8 == 0  # 3 x 3 blocks: a multiple of 72
    assert heads % 9 == 0
    assert 0 < heads < 576
