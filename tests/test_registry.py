"""One file and one decorator join a method, a score, an estimator; a user's own joins too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robust_prune import compress
from robust_prune.errors import UsageError
from robust_prune.registry import (
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
    kept = [(r, dict(r._functions), dict(r._facts)) for r in (METHODS, SCORES, ESTIMATORS)]
    yield
    for registry, functions, facts in kept:
        registry._functions, registry._facts = functions, facts


@pytest.mark.parametrize("registry", [METHODS, SCORES, ESTIMATORS])
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
