"""One file and one decorator join a method, a score, an estimator; a user's own joins too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust_prune import compress
from robust_prune.errors import UsageError
from robust_prune.registry import (
    ALLOCATIONS,
    ESTIMATORS,
    METHODS,
    SCORES,
    Registry,
    channel_score,
    training_method,
)
from tests.conftest import tiny_resnet

DATA = (torch.rand(24, 3, 32, 32), torch.arange(24) % 10)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    registries = (METHODS, SCORES, ESTIMATORS, ALLOCATIONS)
    for registry in registries:
        for name in registry:
            registry.find(name)  # what is read later would be forgotten too
    kept = [(r, dict(r._functions), dict(r._facts)) for r in registries]
    yield
    for registry, functions, facts in kept:
        registry._functions, registry._facts = functions, facts


@pytest.mark.parametrize("registry", [METHODS, SCORES, ESTIMATORS, ALLOCATIONS])
def test_names_are_those_of_the_folder_and_each_file_registers_its_own(registry: Registry) -> None:
    assert len(list(registry)) >= 3
    for name in registry:
        assert callable(registry.find(name))
        assert registry.find(name).__module__.endswith("." + name.replace("-", "_"))
        assert registry.summary(name).endswith(".")


def last_first(model: nn.Module, graph: object, adversarial: object) -> dict[str, Tensor]:
    """A score by which the first channels go."""
    return {g.name: torch.arange(g.units, dtype=torch.float32) for g in graph.groups}


def one_short(model: nn.Module, graph: object, adversarial: object) -> dict[str, Tensor]:
    return {g.name: torch.ones(g.units - 1) for g in graph.groups}


def test_a_score_of_the_users_own_decides_which_channels_go() -> None:
    channel_score("last-first")(last_first)
    for score in ("last-first", "tests.test_registry:last_first"):
        plan = compress(tiny_resnet(), DATA, allocation="uniform", score=score).plan
        for group in plan.groups:
            assert group.keep == tuple(range(group.width - group.keep_width, group.width))
        assert any(group.keep_width < group.width for group in plan.groups)
    with pytest.raises(UsageError, match=r"must give .* finite numbers for group"):
        compress(tiny_resnet(), DATA, allocation="uniform", score="tests.test_registry:one_short")


def test_a_method_of_the_users_own_has_a_name() -> None:
    seen = []

    @training_method("mine")
    def mine(model: nn.Module, images: Tensor, labels: Tensor, attack: object) -> Tensor:
        seen.append(len(images))
        return nn.functional.cross_entropy(model(images), labels)

    compress(tiny_resnet(), DATA, allocation="uniform", finetune="mine", epochs=1, batch_size=8)
    assert seen


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("os:system", r"can't be called with \(model, images, labels, attack\)"),
        ("free", "use one of ard, mart, n-fgsm, pgd-at, rslad, trades, or package.module:function"),
        ("tests.test_registry:DATA", "not a function but of type tuple"),
        ("no.such:thing", "can't be imported"),
    ],
)
def test_what_is_no_method_is_one_line(asked: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        METHODS.find(asked)


def test_help_is_made_from_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robust_prune.options import FineTuningOptions, PlanningOptions, stated

    assert str(METHODS) in stated(FineTuningOptions)["finetune"].help
    assert str(SCORES) in stated(PlanningOptions)["score"].help
    assert str(ESTIMATORS) in stated(PlanningOptions)["estimator"].help
    assert str(ALLOCATIONS) in stated(PlanningOptions)["allocation"].help


def first_half(problem: Any, evidence: Any) -> dict[str, int]:
    """Take all from the first group that the budget needs, and nothing from the others."""
    assert set(evidence.mrs) == {group.name for group in problem.groups}
    widths = {group.name: group.width for group in problem.groups}
    for group in problem.groups:
        while problem.cost_at(widths) > problem.goal and widths[group.name] > group.min_width:
            widths[group.name] -= group.blocks
    return widths


def nothing(problem: Any, evidence: Any) -> dict[str, int]:
    return {}


def test_an_allocation_of_the_users_own_shares_the_budget_out() -> None:
    result = compress(
        tiny_resnet(), DATA, prune_ratio=0.1, allocation="tests.test_registry:first_half"
    )
    kept = [group.keep_width == group.width for group in result.plan.groups]
    assert kept == sorted(kept), "groups in front give all, those behind nothing"
    assert result.plan.allocation == "tests.test_registry:first_half"
    assert result.plan.reached >= 0.1
    with pytest.raises(UsageError, match="the width None; it must be"):
        compress(tiny_resnet(), DATA, allocation="tests.test_registry:nothing")
