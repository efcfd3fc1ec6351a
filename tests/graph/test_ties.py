"""Attentions that take the width of their heads from their input: one group with that input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

from robust_prune.errors import PlanError
from robust_prune.graph import DependencyGraph, ModelGraph, count_cost, masking_error
from tests.conftest import randomize_
from tests.graph.test_graph import random_plan

SWIN = {"patch_size": [4, 4], "embed_dim": 12, "depths": [1, 2], "num_heads": [3, 6]}
V2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
SMALL = {"img_size": 32, "num_classes": 10, "depth": 2, "embed_dim": 24, "num_heads": 3}
ROUNDING = 1e-7  # rows of queries are multiplied in float32
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    # divides queries by the root of a width that it computes
    "swin": lambda: SwinTransformer(**SWIN, window_size=[2, 2], num_classes=10),
    # takes the second third of a bias
    "swin v2": lambda: SwinTransformer(**SWIN, **V2, window_size=[2, 2], num_classes=10),
    # the bias of keys is a buffer, and in no file
    "beit": lambda: timm.create_model("beit_base_patch16_224", **SMALL),
    "timm's swin v2": lambda: timm.create_model(
        "swinv2_tiny_window8_256",
        img_size=32,
        num_classes=10,
        depths=(1, 1),
        embed_dim=12,
        num_heads=(3, 6),
        window_size=4,
    ),
    # layers mix heads
    "cait": lambda: timm.create_model("cait_xxs24_224", **{**SMALL, "depth": 1}),
    # queries and keys in one layer, values in another
    "convit": lambda: timm.create_model(
        "convit_tiny", **{**SMALL, "embed_dim": 8}, local_up_to_layer=1
    ),
    # channels attend to channels
    "xcit": lambda: timm.create_model("xcit_nano_12_p8_224", **{**SMALL, "depth": 1}),
    "davit": lambda: timm.create_model(
        "davit_tiny",
        num_classes=10,
        depths=(1, 1),
        embed_dims=(12, 24),
        num_heads=(3, 6),
        window_size=4,
    ),
}


@pytest.mark.parametrize(
    "name", [n if n != "davit" else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS]
)
def test_all_weights_lie_along_channels_and_are_pruned_as_masking_does(name: str) -> None:
    torch.manual_seed(0)
    net, size = randomize_(NETWORKS[name]()).eval(), (3, 32, 32)
    graph = ModelGraph(net, size)
    assert graph.reachable > 0.97
    assert graph.ties
    plan = random_plan(graph, 0.5)
    dense = copy.deepcopy(net)
    graph.apply_(plan)
    assert masking_error(dense, net, plan, torch.rand(2, *size)) < ROUNDING
    counted = count_cost(net, size)
    assert (counted.macs, counted.params) == (plan.pruned.macs, plan.pruned.params)


class Tokens(nn.Module):
    """Learned tokens beside those of an image, and a scale that the module keeps or computes."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.tokens, self.patches = nn.Parameter(torch.rand(1, 3, 8)), nn.Conv2d(3, 8, 4, 4)
        self.queries, self.keys = nn.Linear(8, 12), nn.Linear(8, 12)
        self.head, self.root = nn.Linear(8, 5), 12**-0.5 if kept else None

    def forward(self, images: Tensor) -> Tensor:
        x = torch.cat([self.tokens, self.patches(images[:1]).flatten(2).mT], 1)
        queries, keys = self.queries(x), self.keys(x)
        scale = self.root or queries.shape[-1] ** -0.5
        return self.head(((queries * scale) @ keys.mT).softmax(-1) @ x)


class Channels(nn.Module):
    """Channels that attend to channels, of which the map may be returned or done something to."""

    def __init__(self, odd: str = "") -> None:
        super().__init__()
        self.patches, self.qkv = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 36)
        self.proj, self.head, self.odd = nn.Linear(12, 8), nn.Linear(8, 5), odd

    def forward(self, images: Tensor) -> Any:
        x = self.patches(images).flatten(2).mT
        queries, keys, values = self.qkv(x).unflatten(-1, (3, 12)).permute(2, 0, 3, 1)
        weights = (queries @ keys.mT).softmax(-1)
        if self.odd == "averaged":
            values = values * weights.mean()
        x = self.head(self.proj((weights @ values).mT).mean(1))
        return (x, weights) if self.odd == "returned" else x


@pytest.mark.parametrize(
    ("odd", "groups"),
    [
        ("", ["patches", "qkv", "proj"]),
        ("returned", ["patches", "proj"]),
        ("averaged", ["patches", "proj"]),
    ],
)
def test_a_map_of_channels_with_channels_that_the_rules_do_not_know_keeps_them(
    odd: str, groups: list[str]
) -> None:
    net = Channels(odd).eval()
    graph = DependencyGraph(probe=False).build_dependency(net, torch.rand(1, 3, 16, 16))
    assert [group.name for group in graph.groups] == groups


@pytest.mark.parametrize("kept", [False, True])
def test_a_scale_follows_its_width_where_the_code_computes_it(kept: bool) -> None:
    torch.manual_seed(0)
    net = randomize_(Tokens(kept)).eval()
    graph = ModelGraph(net, (3, 16, 16))
    assert [group.name for group in graph.groups] == ["patches", "queries"]
    plan = random_plan(graph, 0.5)
    dense = copy.deepcopy(net)
    graph.apply_(plan)
    assert masking_error(dense, net, plan, torch.rand(1, 3, 16, 16)) < ROUNDING


def test_what_cannot_be_tied_is_refused() -> None:
    ties = (("queries.weight:1", "queries.weight:0"),)
    with pytest.raises(PlanError, match=r"8 channels, to .*, 12 channels"):
        ModelGraph(Tokens(True), (3, 16, 16), ties=ties)
