"""Reconstruction against least squares by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from robust_prune.graph import ModelGraph
from robust_prune.repair import Reconstruction, dense_moments, kept_rows, reconstruct_
from robust_prune.types import PruningPlan
from tests.conftest import OwnNet, randomize_, tiny_resnet
from tests.criteria.test_curves import plan_of
from tests.graph.test_tracing import build


def errors(model: nn.Module, dense: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        found, expected = model(images), dense(images)
    return float((found - expected).square().mean() / expected.square().mean())


def test_linear_layers_get_the_ridge_solution() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    images = torch.rand(40, 3, 2, 2).double()
    graph = ModelGraph(net, (3, 2, 2))
    plan = plan_of(graph, {"1": 5}, (3, 2, 2))
    pruned = graph.pruned(plan)
    old = pruned[3].weight.detach().clone()
    fits = reconstruct_(
        pruned, dense_moments(net, images), kept_rows(graph, plan), images, ridge=0.2
    )
    x, y = torch.relu(pruned[1](images.flatten(1))), net(images)
    x, y = (x - x.mean(0)).detach(), (y - y.mean(0)).detach()
    strength = 0.2 * x.square().sum(0).mean() * torch.eye(5).double()
    expected = torch.linalg.solve(x.T @ x + strength, x.T @ y + strength @ old.T).T
    torch.testing.assert_close(pruned[3].weight.detach(), expected)
    torch.testing.assert_close(pruned(images).mean(0), net(images).mean(0))
    assert [fit.layer for fit in fits] == ["1", "3"]
    assert fits[1].after < fits[1].before


def test_redundant_channels_are_replaced_exactly() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    ).double()
    randomize_(net)
    with torch.no_grad():
        net[0].weight[4:], net[0].bias[4:] = net[0].weight[:4], net[0].bias[:4]
        net[0].weight[4:] *= 0.1  # the same channel, weaker: what l2 scores drop
        net[0].bias[4:] *= 0.1
    net.eval()
    images = torch.rand(64, 3, 12, 12).double()
    graph = ModelGraph(net, (3, 12, 12))
    plan = plan_of(graph, {"0": 4, "2": 6, "5": 4}, (3, 12, 12))
    assert plan.group("0").keep == (0, 1, 2, 3)
    pruned = graph.pruned(plan)
    target = Reconstruction.of(net, images)
    fits = reconstruct_(pruned, target.dense, kept_rows(graph, plan), images, ridge=1e-9)
    assert fits[1].layer == "2"
    assert fits[1].after < 1e-9 < 1e-4 < fits[1].before
    # batch norms took over the statistics of these images
    assert float(pruned[3].running_mean.sub(net[3].running_mean).abs().max()) > 0.01


@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_a_pruned_resnet_comes_closer_to_the_dense_one(ratio: float) -> None:
    model = tiny_resnet(channels=[16, 24, 32, 48], stem_width=8)
    graph = ModelGraph(model, (3, 32, 32))
    images, fresh = torch.rand(192, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(
        128
    )
    target = Reconstruction.of(model, images)
    before = copy.deepcopy(model.state_dict())
    plan = plan_of(
        graph, {g.name: max(2, round(g.width * (1 - ratio))) for g in graph.groups}, (3, 32, 32)
    )
    pruned = graph.pruned(plan)
    plain = errors(pruned, model, fresh)
    fits = target.apply_(pruned, kept_rows(graph, plan))
    assert errors(pruned, model, fresh) < 0.5 * plain
    assert len(fits) == len([m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def pruned_to(arch: str, share: float) -> tuple[nn.Module, ModelGraph, PruningPlan, nn.Module]:
    model, size = build(arch)
    graph = ModelGraph(model, size)
    widths = {g.name: max(1, round(g.units * share)) * g.blocks for g in graph.groups}
    plan = plan_of(graph, widths, size)
    return model, graph, plan, graph.pruned(plan)


def test_queries_keep_the_factor_that_their_narrower_heads_need() -> None:
    model, graph, plan, pruned = pruned_to("vit_tiny_patch16_224", 0.25)
    rows = kept_rows(graph, plan)
    _, factors = rows["blocks.0.attn.qkv"]
    third = len(factors) // 3
    assert float(factors[third:].min()) == 1
    torch.testing.assert_close(factors[:third], torch.full((third,), 0.5))
    images = torch.rand(32, *graph.input_size, generator=torch.Generator().manual_seed(0))
    before = pruned.net.blocks[0].attn.qkv.weight[:third].norm()
    fits = Reconstruction.of(model, images).apply_(pruned, rows)
    assert {fit.layer for fit in fits} >= {"blocks.0.attn.qkv", "blocks.0.mlp.fc2", "head"}
    assert float(pruned.net.blocks[0].attn.qkv.weight[:third].norm()) < 1.3 * float(before)


def test_layers_that_mix_tokens_are_left_alone() -> None:
    torch.manual_seed(0)

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mix, self.out = (
                nn.Conv2d(3, 40, 4, 4),
                nn.Linear(16, 16),
                nn.Linear(40, 5),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.first(x)).flatten(2)
            return self.out((x + self.mix(x)).mean(2))

    net = Mixing().eval()
    graph = ModelGraph(net, (3, 16, 16))
    images = torch.rand(16, 3, 16, 16)
    plan = plan_of(graph, {g.name: g.width // 2 for g in graph.groups}, (3, 16, 16))
    pruned = graph.pruned(plan)
    mixed = pruned.mix.weight.clone()
    fits = Reconstruction.of(net, images).apply_(pruned, kept_rows(graph, plan))
    assert [fit.layer for fit in fits] == ["first", "out"]
    assert torch.equal(pruned.mix.weight, mixed)


def test_layers_that_one_product_does_not_compute_are_left_alone() -> None:
    net = randomize_(OwnNet(width=8)).eval()
    found = dense_moments(net, torch.rand(8, 3, 16, 16))
    assert set(found) == {"first", "skip", "hidden", "out"}
    assert found["first"].free
    assert found["skip"].free  # has a bias

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1, bias=False)
            self.out = nn.Linear(3, 2, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.layer(self.layer(x)).mean((2, 3)))

    found = dense_moments(Twice(), torch.rand(4, 3, 4, 4))
    assert set(found) == {"out"}
    assert not found["out"].free
