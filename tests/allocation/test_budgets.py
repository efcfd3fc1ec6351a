"""Budgets as people state them: single layers, several targets, and a measurement used again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import robust_prune as rp
from robust_prune.allocation import Problem, allocate_by_curves, allocate_evenly, make_plan
from robust_prune.allocation.greedy import narrowed
from robust_prune.errors import BudgetError, UsageError
from robust_prune.graph import ModelGraph
from robust_prune.options import PlanningOptions, shares
from robust_prune.pipeline import measuring
from robust_prune.types import Budget, ChannelGroup, Curve
from tests.conftest import tiny_resnet

TRYING: dict[str, Any] = {"calibration_images": 4, "verify": False}


@pytest.fixture(scope="module")
def graph() -> ModelGraph:
    return ModelGraph(tiny_resnet(), (3, 32, 32), probe=False)


def curves_of(graph: ModelGraph) -> dict[str, Curve]:
    """Convex curves, each of another height."""
    return {
        g.name: Curve(g.name, (0.3, 0.6, 0.9), (0.1 * i, 0.3 * i, 1.0 * i))
        for i, g in enumerate(graph.groups, 1)
    }


def test_a_step_that_saves_no_time_is_passed_over(graph: ModelGraph) -> None:
    """On a device a width a little narrower may take longer."""

    def milliseconds(widths: Mapping[str, int]) -> float:
        shares = [widths.get(g.name, g.width) / g.width for g in graph.groups]
        return sum(share if share < 0.9 else 1.9 - share for share in shares)

    problem = Problem(graph.groups, graph.cost, Budget("macs", 0.4), price=milliseconds)
    widths = allocate_by_curves(problem, curves_of(graph))
    assert milliseconds(widths) <= 1.01 * problem.goal


def test_units_of_several_channels_keep_the_least_width() -> None:
    group = ChannelGroup("g", 16, 4, 10, ("g",), ())
    assert group.min_units * group.blocks == 12


@pytest.mark.parametrize("how", ["evenly", "curves"])
@pytest.mark.parametrize(("macs", "params"), [(0.5, 0.5), (0.3, 0.7), (0.7, 0.2), (0.05, 0.9)])
def test_several_budgets_hold_and_no_channel_more_goes(
    graph: ModelGraph, how: str, macs: float, params: float
) -> None:
    budget, other = Budget("macs", macs), Budget("params", params)
    problem = Problem(graph.groups, graph.cost, budget, also=(other,))
    widths = (
        allocate_evenly(problem)
        if how == "evenly"
        else allocate_by_curves(problem, curves_of(graph))
    )
    dense, pruned = graph.cost(), graph.cost(widths)
    gone = {t: 1 - pruned.of(t) / dense.of(t) for t in ("macs", "params")}  # type: ignore[arg-type]
    assert gone["macs"] >= macs
    assert gone["params"] >= params
    # the smallest that holds both: one of them is met within a point and a half
    assert min(gone["macs"] - macs, gone["params"] - params) < 0.015


def test_steps_priced_in_macs_are_those_of_a_budget_of_macs_wherever_they_end(
    graph: ModelGraph,
) -> None:
    def ms(widths: Mapping[str, int]) -> float:  # the first groups cost far more than their MACs
        return sum(widths.get(g.name, g.width) / i for i, g in enumerate(graph.groups, 1))

    def rise(g: ChannelGroup, widths: Mapping[str, int], after: int) -> float:
        return float(1 - after / g.width) ** 2 - (1 - widths[g.name] / g.width) ** 2

    timed = Problem(graph.groups, graph.cost, Budget("macs", 0.4), price=ms)
    widths = narrowed(replace(timed, by_macs=True), rise)
    assert ms(widths) <= timed.goal < ms({g.name: g.width for g in graph.groups})
    reached = 1 - graph.cost(widths).macs / graph.cost().macs - 1e-9  # not below by rounding
    assert widths == narrowed(Problem(graph.groups, graph.cost, Budget("macs", reached)), rise)
    assert widths != narrowed(timed, rise)


def test_a_second_budget_that_holds_anyway_changes_nothing(graph: ModelGraph) -> None:
    alone = Problem(graph.groups, graph.cost, Budget("macs", 0.5))
    curves = curves_of(graph)
    widths = allocate_by_curves(alone, curves)
    params = 1 - graph.cost(widths).params / graph.cost().params
    both = Problem(
        graph.groups, graph.cost, Budget("macs", 0.5), also=(Budget("params", params / 2),)
    )
    assert allocate_by_curves(both, curves) == pytest.approx(widths, abs=1)


def test_what_is_out_of_reach_names_the_target(graph: ModelGraph) -> None:
    problem = Problem(
        graph.groups, graph.cost, Budget("macs", 0.2), also=(Budget("params", 0.999),)
    )
    with pytest.raises(BudgetError, match=r"--also params=0\.\d+ or less"):
        allocate_evenly(problem)


@pytest.mark.parametrize("how", ["evenly", "curves"])
def test_decided_widths_stay_and_the_others_meet_the_budget(graph: ModelGraph, how: str) -> None:
    fixed = {"layer3.0.conv1": 7, "layer3.0.conv2": 9}
    problem = Problem(graph.groups, graph.cost, Budget("macs", 0.5), fixed=fixed)
    widths = (
        allocate_evenly(problem)
        if how == "evenly"
        else allocate_by_curves(problem, curves_of(graph))
    )
    assert {name: widths[name] for name in fixed} == fixed
    assert 1 - graph.cost(widths).macs / graph.cost().macs == pytest.approx(0.5, abs=0.02)


def test_decided_widths_may_take_more_than_the_budget(graph: ModelGraph) -> None:
    fixed = {g.name: max(g.min_width, g.width // 4) for g in graph.groups}
    problem = Problem(graph.groups, graph.cost, Budget("macs", 0.1), fixed=fixed)
    widths = allocate_evenly(problem)
    assert widths == fixed
    scores = {g.name: [1.0] * g.units for g in graph.groups}
    plan = make_plan(
        problem, widths, scores, allocation="uniform", score="l2", seed=0, input_size=(3, 32, 32)
    )
    assert "the shares asked for of single layers take more" in plan.notes[0]
    assert all("as asked of its layers" in group.note for group in plan.groups)


def test_a_share_of_single_layers() -> None:
    result = rp.compress(
        tiny_resnet(),
        data(),
        prune_ratio=0.4,
        allocation="uniform",
        ratio_of={"layer3.*": 0.5, "conv1.0": 0.0},
        **TRYING,
    )
    gone = {group.name: group.prune_ratio for group in result.plan.groups}
    assert (gone["layer3.0.conv1"], gone["layer3.0.conv2"], gone["conv1.0"]) == (0.5, 0.5, 0.0)
    assert len({round(gone[n], 1) for n in ("layer4.0.conv1", "layer4.0.conv2")}) == 1
    assert result.plan.reached == pytest.approx(0.4, abs=0.02)


def test_only_some_layers_lose_channels() -> None:
    small = rp.compress(
        tiny_resnet(), data(), prune_ratio=0.15, allocation="uniform", only="layer3.*", **TRYING
    )
    assert {group.name.split(".")[0] for group in small.plan.groups} == {"layer3"}
    assert any("not among those to prune" in item.reason for item in small.plan.unprunable)
    dense = tiny_resnet().net.state_dict()
    for name, tensor in small.model.net.state_dict().items():
        if not name.startswith(("layer3", "layer4.0.conv1", "layer4.0.downsample")):
            assert tensor.shape == dense[name].shape


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"only": "layr3.0"}, "only: no layer is called 'layr3.0'; did you mean layer3.0"),
        ({"ratio_of": {"layr3.0": 0.5}}, "did you mean layer3.0"),
        ({"ratio_of": {"fc": 0.5}}, "none of these layers can lose channels: fc: "),
        ({"ratio_of": {"layer3.*": 0.5, "layer3.0.conv1": 0.6}}, "asks for 0.5 and"),
        ({"ratio_of": ("layer3.*",)}, "must be NAME=SHARE"),
        ({"ratio_of": {"layer3.*": 1.0}}, r"share in \[0, 1\)"),
        ({"also": {"macs": 0.5}}, "that is what --ratio is about"),
        ({"also": {"milliseconds": 0.5}}, "give one of macs, params, channels"),
        ({"also": {"params": 0.5}, "prune_steps": 2}, "not with 2 pruning steps"),
    ],
)
def test_what_cant_be_asked_is_one_line(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        rp.compress(tiny_resnet(), data(), prune_ratio=0.2, **asked, **TRYING)
    assert "\n" not in str(caught.value)


def test_shares_are_read() -> None:
    assert shares(("a=b=0.5", "c=0"), "--x") == {"a=b": 0.5, "c": 0.0}
    with pytest.raises(UsageError, match="twice"):
        shares(("a=0.5", "a=0.6"), "--x")
    with pytest.raises(UsageError, match="share above 0"):
        PlanningOptions(also=("params=0",))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("measured") / "m.safetensors"
    return path, rp.compress(tiny_resnet(), data(), prune_ratio=0.3, measured=path, **TRYING)


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(32, 3, 32, 32, generator=generator)
    return [(images, torch.arange(32) % 10)]


def test_a_measurement_used_again_gives_the_plan_of_a_fresh_run(
    measured: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, first = measured
    written = path.read_bytes()
    fresh = rp.compress(tiny_resnet(), data(), prune_ratio=0.6, **TRYING)

    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("measured anew")

    for name in ("adversarial_set", "channel_scores", "structural_curves", "measure_mrs"):
        monkeypatch.setattr(measuring, name, never)
    again = rp.compress(tiny_resnet(), data(), prune_ratio=0.6, measured=path, **TRYING)
    assert again.plan == fresh.plan
    assert again.plan != first.plan
    assert again.sensitivity.groups == fresh.sensitivity.groups
    assert again.report["curves"] == fresh.report["curves"]
    for mine, theirs in zip(
        again.model.state_dict().values(), fresh.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert path.read_bytes() == written


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "of another (images|seed)"),
        ({"threat": rp.ThreatModel.linf("4/255")}, "of another threat"),
        ({"score": "taylor"}, "of another score"),
        ({"protect": ("layer3.0.conv1",)}, "of another groups"),
    ],
)
def test_a_measurement_of_something_else_is_refused(
    measured: tuple[Path, Any], change: dict[str, Any], said: str
) -> None:
    path, _ = measured
    with pytest.raises(UsageError, match=said):
        rp.compress(tiny_resnet(), data(), measured=path, **TRYING, **change)


def test_a_measurement_of_another_model_or_none_at_all_is_refused(
    measured: tuple[Path, Any], tmp_path: Path
) -> None:
    path, _ = measured
    with pytest.raises(UsageError, match="of another model"):
        rp.compress(tiny_resnet(1), data(), measured=path, **TRYING)
    wrong = tmp_path / "w.safetensors"
    rp.save(tiny_resnet(), wrong)
    with pytest.raises(UsageError, match="no measurement"):
        rp.compress(tiny_resnet(), data(), measured=wrong, **TRYING)
    with pytest.raises(UsageError, match="there is no folder"):
        rp.compress(tiny_resnet(), data(), measured=tmp_path / "a" / "m", **TRYING)
