"""torch's multi-head attention: its heads are pruned as masking says, however it is called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import robust_prune as rp
from robust_prune.errors import ModelError
from robust_prune.graph import ModelGraph, count_cost, masking_error
from robust_prune.modules import NarrowAttention, difference
from tests.graph.test_costs import by_torch
from tests.graph.test_dependency import assert_masked
from tests.graph.test_graph import random_plan

SIZE = 3, 16, 16


class Attending(nn.Module):
    """16 patches that attend to themselves, or that five learned queries attend to."""

    def __init__(self, learned: bool = False, weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 4, **options)
        self.patches = nn.Conv2d(3, self.attention.kdim, 4, 4)
        self.queries = nn.Parameter(torch.zeros(1, 5, 24)) if learned else None
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 10)
        self.weights = weights

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        queries = x if self.queries is None else self.queries.expand(len(x), -1, -1)
        first = self.attention.batch_first
        if not first:
            x, queries = x.transpose(0, 1), queries.transpose(0, 1)
        keys = queries if self.queries is None else x
        found = self.attention(queries, keys, keys, need_weights=self.weights)[0]
        return self.head(self.norm(found).mean(1 if first else 0))


class Encoding(nn.Module):
    """16 patches through torch's own encoder layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, 4)
        layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(images).flatten(2).mT).mean(1))


def torchvisions(heads: int = 4) -> nn.Module:
    return VisionTransformer(16, 4, 2, heads, hidden_dim=64, mlp_dim=128, num_classes=10)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": torchvisions,
    "as many heads as dims": lambda: torchvisions(heads=8),
    "images first": lambda: Attending(batch_first=True),
    "tokens first": Attending,
    "with weights": lambda: Attending(weights=True),
    "without bias": lambda: Attending(bias=False),
    "other queries": lambda: Attending(learned=True, batch_first=True),
    "more keys": lambda: Attending(learned=True, add_bias_kv=True, add_zero_attn=True),
    "three weights": lambda: Attending(learned=True, kdim=20, vdim=20),
    "three weights alone": lambda: Attending(learned=True, kdim=20, vdim=20, bias=False),
    "encoder": Encoding,
    "encoder, norms first": lambda: Encoding(norm_first=True, activation="gelu"),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    return net


def attentions(net: nn.Module) -> list[nn.MultiheadAttention]:
    return [module for module in net.modules() if isinstance(module, nn.MultiheadAttention)]


@pytest.mark.parametrize("whole_heads", [False, True], ids=["dims", "heads"])
@pytest.mark.parametrize("name", NETWORKS)
def test_heads_are_pruned_as_masking_does_and_reload_bit_equal(
    name: str, whole_heads: bool, tmp_path: Path
) -> None:
    net, images = network(name), torch.rand(2, *SIZE)
    dense = copy.deepcopy(net)
    graph = ModelGraph(net, SIZE, whole_heads=whole_heads)
    plan = random_plan(graph, 0.5)
    graph.apply_(plan)
    assert masking_error(dense, net, plan, images) < 1e-7
    for before, after in zip(attentions(dense), attentions(net), strict=True):
        heads, width = after.num_heads, after.head_dim
        assert (heads < before.num_heads, width < before.head_dim) == (whole_heads, not whole_heads)
        packed = after.q_proj_weight is None
        weight = after.in_proj_weight if packed else after.q_proj_weight
        assert weight.shape == ((3 if packed else 1) * heads * width, after.embed_dim)
        assert after.out_proj.weight.shape[1] == heads * width
    assert count_cost(net, SIZE).macs == plan.pruned.macs == by_torch(net, SIZE)
    net(images).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    again = rp.load(rp.save(net, tmp_path / "m.safetensors"), model=network(name))
    with torch.no_grad():
        assert torch.equal(again(images), net(images))


@pytest.mark.parametrize("name", ["torchvision", "three weights alone", "encoder"])
@pytest.mark.parametrize("global_pruning", [False, True])
def test_torch_prunings_pruner_cuts_them_and_its_history_is_replayed(
    name: str, global_pruning: bool
) -> None:
    net, images = network(name), torch.rand(4, *SIZE)
    dense = copy.deepcopy(net)
    with rp.dependency_graph():
        pruner = tp.pruner.BasePruner(
            net,
            images,
            tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=0.5,
            global_pruning=global_pruning,
            iterative_steps=2,
        )
    pruner.step()
    pruner.step()
    assert all(type(module) is NarrowAttention for module in attentions(net)) or name != "encoder"
    assert_masked(dense, net, pruner.DG, images)
    graph = rp.DependencyGraph().build_dependency(dense, images)
    graph.load_pruning_history(pruner.DG.pruning_history())
    with torch.no_grad():
        assert torch.equal(dense(images), net(images))


def test_an_attention_that_is_protected_keeps_its_heads() -> None:
    net = network("torchvision")
    graph = ModelGraph(net, SIZE, protect=["encoder.layers.encoder_layer_0.self_attention"])
    reasons = {item.name: item.reason for item in graph.unprunable}
    assert "protected" in reasons["encoder.layers.encoder_layer_0.self_attention"]
    names = [group.name for group in graph.groups if "self_attention" in group.name]
    assert names == ["encoder.layers.encoder_layer_1.self_attention.in_proj_weight"]


class Halves(nn.Module):
    """Two layers whose weights are the halves of one, and whose outputs never meet."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 3))
        self.first, self.second = nn.Linear(12, 10), nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        one, two = self.weight.chunk(2)
        x = images.mean((2, 3))
        return self.first(x @ one.T) + self.second(nn.functional.linear(x, two).relu())


class LinearHalves(Halves):
    def forward(self, images: Tensor) -> Tensor:
        x = images.mean((2, 3))
        one, two = (nn.functional.linear(x, half) for half in self.weight.chunk(2))
        return self.first(one) + self.second(two.relu())


def test_layers_whose_weights_are_pieces_of_one_stay_equally_wide() -> None:
    torch.manual_seed(0)
    net, images = LinearHalves().eval(), torch.rand(2, *SIZE)
    dense, graph = copy.deepcopy(net), ModelGraph(net, SIZE)
    assert [(group.units, group.width) for group in graph.groups] == [(12, 24)]
    plan = random_plan(graph, 0.5)
    graph.apply_(plan)
    assert masking_error(dense, net, plan, images) < 1e-12
    assert count_cost(net, SIZE).macs == plan.pruned.macs == by_torch(net, SIZE)


def test_a_piece_that_is_no_layers_weight_stays() -> None:
    assert ModelGraph(Halves().eval(), SIZE).groups == ()


class Own(nn.MultiheadAttention):
    """A subclass that also turns its channels round, which no adapter for torch's knows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return out * torch.linspace(1, 2, out.shape[-1]), weights


def test_a_subclass_is_traced_by_its_own_forward() -> None:
    net = network("images first")
    net.attention.__class__ = Own
    graph = ModelGraph(net, SIZE)
    assert not any("in_proj" in group.name for group in graph.groups)


MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "forbidden": {"attn_mask": torch.ones(5, 7).tril(2).logical_not()},
    "added, by head": {"attn_mask": torch.linspace(-2, 2, 2 * 3 * 5 * 7).view(6, 5, 7).double()},
    "padding": {"key_padding_mask": torch.arange(7).expand(2, 7) > torch.tensor([[4], [6]])},
    "both": {
        "attn_mask": torch.linspace(-2, 2, 35).view(5, 7).double(),
        "key_padding_mask": torch.linspace(-1, 1, 14).view(2, 7).double(),
    },
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"kdim": 8, "vdim": 12},
    ],
    ids=str,
)
def test_the_forward_for_narrow_heads_is_torchs_where_they_are_not(
    options: dict[str, Any], masks: str
) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, **options).double().eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    narrow = copy.deepcopy(attention)
    narrow.__class__ = NarrowAttention
    inputs = [
        torch.randn(2, tokens, width).double()
        for tokens, width in ((5, 12), (7, attention.kdim), (7, attention.vdim))
    ]
    if not attention.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    for how in (
        {"need_weights": False},
        {"need_weights": True},
        {"need_weights": True, "average_attn_weights": False},
    ):
        one, two = (module(*inputs, **how, **MASKS[masks]) for module in (attention, narrow))
        assert one[0].shape == two[0].shape
        assert difference(one[0], two[0]) < 1e-12
        assert (one[1] is None) == (two[1] is None) == (not how["need_weights"])
        if one[1] is not None and two[1] is not None:
            assert one[1].shape == two[1].shape
            assert difference(one[1], two[1]) < 1e-12


def test_one_sequence_without_images_and_a_hint_without_its_mask() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, batch_first=True).double().eval()
    narrow = copy.deepcopy(attention)
    narrow.__class__ = NarrowAttention
    x = torch.randn(5, 12).double()
    for one, two in zip(attention(x, x, x), narrow(x, x, x), strict=True):
        assert one.shape == two.shape
        assert difference(one, two) < 1e-12
    with pytest.raises(ModelError, match="hint about attn_mask"):
        narrow(x, x, x, is_causal=True)
