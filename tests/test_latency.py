"""Milliseconds as a budget: tables, what is cached, and plans that meet what is measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import robust_prune as rp
from robust_prune import latency, report
from robust_prune.cli import app
from robust_prune.errors import BudgetError, UsageError
from robust_prune.graph import ModelGraph
from robust_prune.latency import (
    BlockTime,
    Conditions,
    LatencyModel,
    Layer,
    Table,
    alternating,
    latency_model,
    measuring,
)
from robust_prune.modules import network_of
from robust_prune.pipeline import planning, timing
from robust_prune.types import ChannelGroup, PruningPlan
from tests.allocation.test_budgets import data
from tests.conftest import tiny_resnet
from tests.graph.test_graph import random_plan

ONE = Conditions(2, 1, "float32", "a device")


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Layers that take a microsecond for each product of outputs and inputs, and a cache here."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(measuring, "PAIR_MS", 1.0)
    monkeypatch.setattr(measuring, "PAIRS", 2)
    asked: list[tuple[str, int, int]] = []

    def time(layer: Any, outputs: int, inputs: int, *more: Any) -> float:
        asked.append((layer.name, outputs, inputs))
        return outputs * inputs / 1000

    monkeypatch.setattr(measuring, "_time", time)
    return asked


def test_a_table_is_exact_where_time_is_a_product() -> None:
    sides = (4, 16, 40)
    table = Table(sides, sides, tuple(tuple(float(o * i) for i in sides) for o in sides))
    for outputs in (4, 9, 16, 17, 40):
        for inputs in (4, 13, 40):
            assert table.at(outputs, inputs) == pytest.approx(outputs * inputs)
    assert table.at(1, 50) == 4 * 40  # nothing is made up beyond what was timed
    assert Table((3,), (5,), ((2.0,),)).at(3, 5) == 2.0


def test_layers_have_the_sizes_that_cutting_gives_them(timed: list[Any]) -> None:
    graph = ModelGraph(tiny_resnet(), (3, 32, 32), probe=False)
    plan = random_plan(graph, 0.5)
    model = latency_model(graph, ONE)
    widths = {group.name: group.keep_width for group in plan.groups}
    pruned = network_of(graph.pruned(plan))
    dropped = model._dropped(widths)
    assert len(model.layers) == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in pruned.modules())
    for layer, _ in model.layers:
        weight = pruned.get_submodule(layer.name).weight
        assert layer.at(dropped) == tuple(weight.shape[:2])
    products = sum(o * i for o, i in (layer.at(dropped) for layer, _ in model.layers)) / 1000
    assert sum(model.layers_at(widths).values()) == pytest.approx(products)


def test_the_whole_is_what_was_timed_and_less_with_every_channel(timed: list[Any]) -> None:
    graph = ModelGraph(tiny_resnet(), (3, 32, 32), probe=False)
    model = latency_model(graph, ONE)
    whole = LatencyModel(ONE, 1e3, model.layers, model.groups)
    assert whole.ms({}) == pytest.approx(1e3)
    before = 1e3
    widths = {group.name: group.width for group in graph.groups}
    for group in graph.groups:
        widths[group.name] = group.min_width
        assert whole.ms(widths) < before
        before = whole.ms(widths)


def test_shapes_are_timed_once_on_a_device(timed: list[Any], tmp_path: Path) -> None:
    graph = ModelGraph(tiny_resnet(), (3, 32, 32), probe=False)
    first = latency_model(graph, ONE).layer_ms
    assert timed
    timed.clear()
    assert latency_model(graph, ONE).layer_ms == first
    assert not timed
    path = latency.cache_path(ONE)
    assert path.is_relative_to(tmp_path)
    path.write_text(json.dumps({"ms": {"x": "long", "y": None, "z": -1}}))
    latency_model(graph, ONE)
    assert timed, "what is no time is measured anew"
    assert latency.cache_path(Conditions(2, 2, "float32", "a device")) != path


def test_real_times_are_positive_and_leave_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).train()
    model(torch.rand(1, 3, 8, 8))
    large = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).train()
    images = torch.rand(2, 3, 8, 8)
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    small_ms, large_ms = alternating([model, large], images, ONE, 3)
    assert 0 < small_ms < large_ms
    assert model.training
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model[0].weight.grad is None
    half = Conditions(2, 1, "bfloat16", "a device")
    assert alternating([model], images, half, 1)[0] > 0
    assert model[0].weight.dtype == torch.float32


def of_parameters(offset: float) -> Any:
    """Times that a model of layers does not know: a constant, and a nanosecond for a parameter."""

    def times(models: Any, images: Any, conditions: Any, pairs: int) -> list[float]:
        return [offset + sum(p.numel() for p in m.parameters()) / 1e6 for m in models]

    return times


def to_time(**options: Any) -> rp.CompressResult:
    """Prune a small network to a share of its time."""
    told = {"prune_ratio": 0.5, "latency_threads": 1, "calibration_images": 4, "verify": False}
    return rp.compress(tiny_resnet(), data(), target="latency", **{**told, **options})


@pytest.mark.parametrize("allocation", ["uniform", "curve"])
def test_a_plan_meets_the_time_that_is_measured(
    allocation: str, timed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "alternating", of_parameters(0.01))
    result = to_time(allocation=allocation)
    told = result.report["latency"]
    assert told["pruned_ms"] / told["dense_ms"] == pytest.approx(0.5, abs=0.011)
    params = sum(p.numel() for p in result.model.parameters())
    assert told["pruned_ms"] == pytest.approx(0.01 + params / 1e6)
    assert result.plan.budget.target == "macs"
    assert result.plan.budget.prune_ratio == pytest.approx(result.plan.reached)
    assert any("1 thread" in row[0] for row in report.cost_rows(result.report))


def test_time_that_widths_change_more_than_they_should_is_met_all_the_same(
    timed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels change with widths: steps by the ratio of times alone lead further away each time."""

    def steep(models: Any, images: Any, conditions: Any, pairs: int) -> list[float]:
        dense, pruned = (float(sum(p.numel() for p in m.parameters())) for m in models)
        return [1.0, max(0.02, 3 * pruned / dense - 0.9)]

    monkeypatch.setattr(timing, "alternating", steep)
    result = to_time(allocation="uniform")
    assert result.report["latency"]["pruned_ms"] == pytest.approx(0.5, abs=0.011)


def test_steps_are_priced_both_ways_and_the_better_model_is_taken(
    timed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "alternating", of_parameters(0.0))
    judged: list[list[PruningPlan]] = []
    real = planning.best_composed

    def last_is_best(graph: Any, plans: Any, *more: Any, **options: Any) -> tuple[int, list[float]]:
        judged.append(list(plans))
        _, losses = real(graph, plans, *more, **options)
        return len(plans) - 1, losses

    monkeypatch.setattr(planning, "best_composed", last_is_best)
    result = to_time()
    by_time, by_macs, finals = judged
    assert not set(by_time) & set(by_macs)
    assert len(finals) == 2
    assert result.plan.digest == finals[1].digest != finals[0].digest
    assert len(result.report["search"]["candidates"]) == 2


def test_time_that_widths_do_not_change_is_said(
    timed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "alternating", lambda models, *more: [1.0, 0.9])
    result = rp.compress(
        tiny_resnet(), data(), target="latency", allocation="uniform", verify=False
    )
    assert "90 % were measured" in result.plan.notes[-1]
    assert result.report["latency"]["rounds"] > 1


@pytest.mark.parametrize(("time", "params", "binds"), [(0.3, 0.7, "params"), (0.6, 0.2, "time")])
def test_time_and_another_budget_both_hold(
    time: float, params: float, binds: str, timed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "alternating", of_parameters(0.0))  # time falls as parameters do
    result = to_time(prune_ratio=time, also={"params": params}, allocation="uniform")
    plan, told = result.plan, result.report["latency"]
    left = plan.pruned.params / plan.dense.params
    assert told["pruned_ms"] / told["dense_ms"] == pytest.approx(left)
    assert left <= min(1 - time + 0.011, 1 - params)
    assert left == pytest.approx(1 - (params if binds == "params" else time), abs=0.03)
    assert ("params asked for take more" in plan.notes[-1]) == (binds == "params")


def test_a_block_takes_all_of_its_time_with_it() -> None:
    """Layers of 100 outputs and inputs that take 1 ms, and 6 ms of something else in a block."""
    groups = tuple(ChannelGroup(name, 100, 1, 2, (name,), ()) for name in ("b.in", "out"))

    def layer(name: str, made: str, read: str) -> Layer:
        shares = ((0, made, 1), (1, read, 1)) if read else ((0, made, 1),)
        return Layer(name, (100, 100), shares, (1, 100), ("linear", True))

    layers = (layer("b.in", "b.in", ""), layer("b.out", "out", "b.in"), layer("out", "out", ""))
    table = Table((1, 100), (100,), ((0.01,), (1.0,)))
    block = BlockTime("b", ("b.in",), ("b.in", "b.out"), 8.0)
    model = LatencyModel(ONE, 11.0, tuple((each, table) for each in layers), groups, (block,))
    assert model.ms({}) == pytest.approx(11.0)
    assert model.ms({"b.in": 0}) == pytest.approx(11.0 - 8.0)
    assert model.layers_at({"b.in": 0}) == {"b.in": 0.0, "b.out": 0.0, "out": 1.0}
    half = model.ms({"b.in": 50})  # of one of the two layers in the block
    assert half == pytest.approx(11.0 - 6 / 4 - 0.5, abs=0.01)
    unknown = dataclasses.replace(model, blocks=())
    assert unknown.ms({"b.in": 0}) == pytest.approx(1 + 8 / 3)  # as outputs fall
    more = dataclasses.replace(model, blocks=(dataclasses.replace(block, ms=20.0),))
    assert more.ms({"b.in": 0}) == pytest.approx(1.0)  # never less than what layers take


def test_blocks_are_timed_where_they_may_go(timed: list[Any]) -> None:
    graph = ModelGraph(tiny_resnet(), (3, 32, 32))
    found = latency_model(graph, ONE, graph.blocks)
    assert [block.name for block in found.blocks] == [block.name for block in graph.blocks]
    assert all(block.ms > 0 for block in found.blocks)
    assert found.blocks[1].layers == ("layer2.0.conv1", "layer2.0.conv2")  # not its skip
    assert latency_model(graph, ONE).blocks == ()


def test_what_cant_be_asked_is_one_line(timed: list[Any]) -> None:
    with pytest.raises(UsageError, match="not with --steps"):
        rp.compress(
            *(tiny_resnet(), data()), target="latency", prune_steps=2, finetune="pgd-at", epochs=2
        )
    with pytest.raises(BudgetError, match=r"use --also params=0\.\d+ or less"):
        rp.compress(tiny_resnet(), data(), target="latency", also={"params": 0.9999})
    with pytest.raises(BudgetError, match=r"less time is out of reach: about \d+\.\d % can go"):
        rp.compress(tiny_resnet(), data(), target="latency", prune_ratio=0.999)


def test_info_shows_every_layer(
    timed: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    rp.save(tiny_resnet(), tmp_path / "m.safetensors")
    app(["--json", "info", str(tmp_path / "m.safetensors"), "--latency"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)["latency"]
    assert "layer4.0.conv2" in found["layer_ms"]
    assert 0 < found["least_share_without_blocks"] <= found["least_share"] < 1
    assert list(found["blocks"]) == ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    assert found["dense_ms"] > 0
