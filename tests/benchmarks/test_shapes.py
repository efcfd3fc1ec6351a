"""Shapes of one cost, and what is said to predict the tuned ones."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from torch import nn

from benchmarks.shapes.drawing import at_random, between, layer_weights
from benchmarks.shapes.predicting import left_out, predictors
from robust_prune.allocation import Problem
from robust_prune.graph import ModelGraph
from robust_prune.types import Budget


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(48, 24, 3, padding=1),
        nn.Flatten(),
        nn.Linear(24 * 64, 10),
    )


def test_random_shapes_differ_and_cost_what_is_asked() -> None:
    graph = ModelGraph(network(), (3, 8, 8))
    problem = Problem(graph.groups, graph.cost, Budget("macs", 0.75))
    found = [at_random(problem, random.Random(i)) for i in range(5)]
    assert len({tuple(widths.values()) for widths in found}) == 5
    for widths in found:
        assert graph.cost(widths).macs / graph.cost({}).macs == pytest.approx(0.25, abs=0.01)
    assert found[0] == at_random(problem, random.Random(0))


def test_blends_go_from_one_shape_to_the_other_at_the_same_cost() -> None:
    graph = ModelGraph(network(), (3, 8, 8))
    problem = Problem(graph.groups, graph.cost, Budget("macs", 0.6))
    first, second = (at_random(problem, random.Random(i)) for i in (1, 4))
    assert between(problem, first, second, 0) == first
    assert between(problem, first, second, 1) == second
    half = between(problem, first, second, 0.5)
    assert graph.cost(half).macs / graph.cost({}).macs == pytest.approx(0.4, abs=0.01)
    for group, width in half.items():
        assert min(first[group], second[group]) <= width <= max(first[group], second[group])


def test_weights_follow_mrs_and_the_control_opposes_it() -> None:
    mrs = {"first": 0.1, "second": 1.0, "third": 0.4}
    found = layer_weights(mrs)
    for name in ("mrs", "log", "rank"):
        ordered = sorted(mrs, key=lambda layer: found[name][layer])
        assert ordered == ["first", "third", "second"]
    assert sorted(mrs, key=lambda layer: found["unrank"][layer]) == ["second", "third", "first"]
    assert sum(found["mrs"].values()) == pytest.approx(3)


def test_a_fit_is_judged_on_what_it_was_not_made_from() -> None:
    draw = np.random.default_rng(0)
    numbers = draw.normal(size=(12, 2))
    tuned = numbers @ [2.0, -1.0] + draw.normal(size=12)
    missed = tuned - cross_val_predict(LinearRegression(), numbers, tuned, cv=LeaveOneOut())
    blind = tuned - np.array([np.delete(tuned, i).mean() for i in range(12)])
    expected = 1 - (missed**2).sum() / (blind**2).sum()
    assert left_out(numbers, tuned, ridge=1e-9) == pytest.approx(expected, abs=1e-6)
    assert left_out(draw.normal(size=(12, 9)), tuned, ridge=1e-9) < 0  # nothing but noise


def test_the_strongest_predictor_comes_first() -> None:
    tuned = [1.0, 2.0, 3.0, 4.0, 5.0]
    found = predictors({"noise": [3, 1, 5, 2, 4], "against": [5, 4, 3, 2, 1]}, tuned)
    assert [each.name for each in found] == ["against", "noise"]
    assert found[0].spearman == pytest.approx(-1)
