"""Log-capacity: by hand, against all widths there are, and against equal shares."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
from torch import nn

from robust_prune.allocation import Problem, allocate_by_capacity, allocate_evenly, log_capacity
from robust_prune.errors import BudgetError, UsageError
from robust_prune.graph import ModelGraph
from robust_prune.types import Budget
from tests.conftest import tiny_resnet

SIZE = (3, 8, 8)
RESNET = ModelGraph(tiny_resnet(channels=[32, 64, 96, 128], stem_width=16), (3, 32, 32))


def chain(*widths: int) -> ModelGraph:
    """Convolutions one behind the other, then a classifier."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((3, *widths)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)]
    return ModelGraph(nn.Sequential(*layers, *head), SIZE)


def problem(graph: ModelGraph, ratio: float, **limits: float) -> Problem:
    return Problem(graph.groups, graph.cost, Budget("macs", ratio), layers=graph.layers, **limits)  # type: ignore[arg-type]


def test_layers_by_hand() -> None:
    graph = chain(4, 6)
    assert list(graph.layers({}).values()) == [3 * 4 * 9, 4 * 6 * 9, 6 * 10]
    first, second = (group.name for group in graph.groups)
    narrow = graph.layers({first: 2, second: 3})
    assert list(narrow.values()) == [3 * 2 * 9, 2 * 3 * 9, 3 * 10]
    assert log_capacity(narrow) == pytest.approx(math.log(54 * 54 * 30))
    last = list(narrow)[-1]
    assert log_capacity(narrow, {last: 2.0}) == pytest.approx(math.log(54 * 54 * 30**2))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_no_widths_within_the_budget_have_more(ratio: float, *, weighted: bool) -> None:
    graph = chain(8, 10, 12)
    asked = problem(graph, ratio)
    weights = {next(iter(graph.layers({}))): 3.0} if weighted else None

    def value(widths: Mapping[str, int]) -> float:
        return log_capacity(graph.layers(widths), weights)

    found = allocate_by_capacity(asked, weights)
    cost = asked.cost_at(found)
    choices = [range(group.min_width, group.width + 1) for group in graph.groups]
    names = [group.name for group in graph.groups]
    every = (dict(zip(names, widths, strict=True)) for widths in itertools.product(*choices))
    best = max(value(widths) for widths in every if asked.cost_at(widths) <= max(cost, asked.goal))
    assert value(found) == pytest.approx(best, abs=0.06)
    assert value(found) > value(allocate_evenly(asked)) - 0.06


def test_a_layer_that_is_worth_more_stays_wider() -> None:
    graph = chain(16, 16, 16)
    group, layer = graph.groups[1].name, list(graph.layers({}))[2]
    plain = allocate_by_capacity(problem(graph, 0.5))
    assert allocate_by_capacity(problem(graph, 0.5), {layer: 5.0})[group] > plain[group]


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_a_residual_network_meets_the_budget_with_more_capacity_than_equal_shares(
    ratio: float,
) -> None:
    asked = problem(RESNET, ratio)
    widths = allocate_by_capacity(asked)
    assert asked.cost_at(widths) / asked.dense == pytest.approx(1 - ratio, abs=0.01)
    even = allocate_evenly(asked)
    assert log_capacity(RESNET.layers(widths)) > log_capacity(RESNET.layers(even))


def test_what_can_not_be_had_is_said() -> None:
    with pytest.raises(BudgetError, match="out of reach"):
        allocate_by_capacity(problem(RESNET, 0.9, max_prune_ratio=0.1))
    with pytest.raises(UsageError, match=r"layers=graph\.layers"):
        allocate_by_capacity(Problem(RESNET.groups, RESNET.cost, Budget("macs", 0.5)))
