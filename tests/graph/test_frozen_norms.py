"""Norms frozen into buffers: their vectors go with the channels that they weigh."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch_pruning as tp
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops.misc import FrozenBatchNorm2d

import robust_prune as rp
from robust_prune.graph import ModelGraph, count_cost, prune_
from robust_prune.models import open_model, save
from tests.conftest import randomize_
from tests.graph.test_dependency import assert_masked
from tests.graph.test_graph import assert_pruned_is_masked, random_plan

SIZE = (3, 32, 32)
VECTORS = ("weight", "bias", "running_mean", "running_var")


class WithoutEpsilon(nn.Module):
    """As detectors had it first: a variance of zero gives no number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in VECTORS:
            self.register_buffer(name, torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * self.running_var.rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


def frozen_by(make: Callable[[int], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def freeze(net: nn.Module) -> nn.Module:
        for name, child in net.named_children():
            freeze(child)
            if isinstance(child, nn.BatchNorm2d):
                norm = make(child.num_features)
                for vector in VECTORS:
                    getattr(norm, vector).copy_(getattr(child, vector).detach())
                setattr(net, name, norm)
        return net

    return freeze


FREEZE = {
    "torchvision": frozen_by(FrozenBatchNorm2d),
    "timm": freeze_batch_norm_2d,
    "without epsilon": frozen_by(WithoutEpsilon),
}


def network(freeze: Callable[[nn.Module], nn.Module] | None = None) -> nn.Module:
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", num_classes=5)
    randomize_(net)
    return (freeze(net) if freeze else net).eval()


@pytest.mark.parametrize("how", FREEZE)
def test_frozen_norms_leave_the_groups_that_batch_norm_has(how: str, tmp_path: Path) -> None:
    net = network(FREEZE[how])
    graph, plain = ModelGraph(net, SIZE), ModelGraph(network(), SIZE)
    assert [(g.name, g.width) for g in graph.groups] == [(g.name, g.width) for g in plain.groups]
    plan = random_plan(graph, 0.5)
    assert_pruned_is_masked(net, plan, torch.rand(2, *SIZE))
    pruned = prune_(copy.deepcopy(net), plan)
    cost = count_cost(pruned, SIZE)
    assert (cost.macs, cost.params) == (plan.pruned.macs, plan.pruned.params)
    save(pruned, tmp_path / "pruned.safetensors")
    loaded, _ = open_model(tmp_path / "pruned.safetensors", model=network(FREEZE[how]))
    images = torch.rand(2, *SIZE)
    assert_close(loaded(images), pruned(images), rtol=0, atol=0)


@pytest.mark.parametrize("how", FREEZE)
def test_frozen_norms_in_a_pruner_of_torch_pruning(how: str) -> None:
    net = network(FREEZE[how])
    dense, images = copy.deepcopy(net), torch.rand(2, *SIZE)
    importance = tp.importance.GroupMagnitudeImportance()
    with rp.dependency_graph():
        pruner = tp.pruner.BasePruner(net, images, importance, pruning_ratio=0.5)
    pruner.step()
    assert count_cost(net, SIZE).macs < 0.5 * count_cost(dense, SIZE).macs
    assert_masked(dense, net, pruner.DG, images)


class Windowed(nn.Module):
    """Weighs positions, not channels, by a saved vector."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(32))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.window


def test_a_window_over_positions_is_no_norm() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Windowed(), nn.Conv2d(8, 4, 3)).eval()
    assert [group.width for group in ModelGraph(net, SIZE).groups] == [8]
