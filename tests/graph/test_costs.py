"""Multiply-adds: by hand, by torch's own counter, and as really pruned; nothing is left unsaid."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import logging
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.zoo import TORCHVISION, members
from robust_prune.errors import PlanError
from robust_prune.graph import ModelGraph, count_cost, prune_
from robust_prune.models import build_model, default_input_size, resolve_spec
from robust_prune.modules import requires_grad
from robust_prune.types import PruningPlan
from tests.conftest import tiny_resnet
from tests.graph.test_graph import random_plan, random_widths_plan
from tests.graph.test_tracing import build

SIZE = 3, 9, 9


def by_torch(net: nn.Module, size: tuple[int, int, int]) -> float:
    """Multiply-adds by torch's FlopCounterMode, whose two flops are one of ours.

    It sees products in their plain kernels only: fused attention and oneDNN's cells are off.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    counter = FlopCounterMode(display=False)
    try:
        with (
            torch.no_grad(),
            requires_grad(net, False),  # its module tracker wants gradient functions otherwise
            torch.backends.mkldnn.flags(enabled=False),
            sdpa_kernel(SDPBackend.MATH),
            counter,
        ):
            net(torch.rand(1, *size))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2


def compared(model: nn.Module, size: tuple[int, int, int]) -> tuple[float, float, ModelGraph]:
    """Our count over torch's, of the dense model and of one pruned to half, and the graph.

    Or as far as can be, where recurrent cells, which stay whole, do most of the work.
    """
    graph = ModelGraph(model, size)
    assert graph.cost().macs == count_cost(model, size).macs
    dense = graph.cost().macs / by_torch(model, size)
    least = graph.cost({g.name: g.min_units * g.blocks for g in graph.groups}).macs
    plan = random_plan(graph, min(0.5, 0.9 * (1 - least / graph.cost().macs)))
    pruned = graph.pruned(plan)
    return dense, plan.pruned.macs / by_torch(pruned, size), graph


@pytest.mark.parametrize(
    "arch",
    [
        "mobilevit_xxs",
        "mobilevitv2_050",
        "vit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "convnext_atto",
        "pvt_v2_b0",
        "mixer_s32_224",
        "eva02_tiny_patch14_224",
        "efficientnet_b0",
        "densenet121",
        "mambaout_femto",
        "res2net50_14w_8s",
    ],
)
def test_the_count_is_torchs_own_dense_and_pruned(arch: str) -> None:
    model, size = build(arch)
    dense, pruned, graph = compared(model, size)
    assert dense == pytest.approx(1, abs=1e-6)
    assert pruned == pytest.approx(1, abs=1e-6)
    assert graph.uncounted == ()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", [*members().values(), *(f"torchvision/{n}" for n in TORCHVISION)])
def test_every_family_is_counted_whole(arch: str) -> None:
    spec = resolve_spec(arch)
    dense, pruned, graph = compared(build_model(spec).eval(), default_input_size(spec))
    assert dense == pytest.approx(1, abs=0.01)
    assert pruned == pytest.approx(1, abs=0.01)
    assert graph.uncounted == ()


class Around(nn.Module):
    """Does `inner` to the 81 pixels of a convolution's 12 channels, as tokens [1, 81, 12]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.out = nn.Conv2d(3, 12, 1), inner, nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.first(images).flatten(2).transpose(1, 2)
        return self.out(self.inner(tokens).mean(1))


BOTH_ENDS = 81 * 3 * 12 + 12 * 4


class Does(nn.Module):
    """A function as a module, with parameters of its own where it wants some."""

    def __init__(self, function: Callable[[Does, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.rand(shape)) if shape else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Recurrent(nn.Module):
    def __init__(self, cell: nn.RNNBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Steps(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell(x[:, 0])
        return (state[0] if isinstance(state, tuple) else state)[:, None]


class Asking(nn.Module):
    """torch's own attention with fewer queries than keys."""

    def __init__(self, **more: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, **more)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[:, :5], x, x)[0]


def _sdpa(module: nn.Module, x: Tensor) -> Tensor:
    q, k = x.view(1, -1, 3, 4).transpose(1, 2), x[:, :20].view(1, -1, 3, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("inner", "macs"),
    [
        (Does(lambda m, x: x), 0),
        (Does(lambda m, x: x @ x.mT @ x), 2 * 81 * 81 * 12),
        (Does(lambda m, x: torch.bmm(x, x.mT)[..., :12]), 81 * 81 * 12),
        (Does(lambda m, x: torch.baddbmm(x[:, :, :1], x, x.mT)[..., :12]), 81 * 81 * 12),
        (Does(lambda m, x: (x @ x[0, 0])[..., None] * x), 81 * 12),
        (Does(lambda m, x: x @ m.weight, 12, 12), 81 * 12 * 12),
        (Does(lambda m, x: (x.view(1, 81, 3, 1, 4) @ m.weight).sum((2, 3)), 3, 4, 12), 81 * 144),
        (Does(lambda m, x: m.weight @ x, 7, 81), 7 * 81 * 12),
        (Does(lambda m, x: F.linear(x, m.weight * 2), 12, 12), 81 * 12 * 12),
        (Does(lambda m, x: torch.tensordot(x, m.weight, 1), 12, 12), 81 * 12 * 12),
        (Does(lambda m, x: torch.inner(x, m.weight), 12, 12), 81 * 12 * 12),
        (Does(lambda m, x: torch.einsum("bnc,bmc->bnm", x, x)[..., :12]), 81 * 81 * 12),
        (Does(lambda m, x: torch.einsum("...nc,...mc", x, x)[..., :12]), 81 * 81 * 12),
        (Does(lambda m, x: torch.einsum("bnc,bmd->bnc", x, x)), 81 * 12),
        (
            Does(lambda m, x: torch.einsum("bnc,bmc,bmd->bnd", x, x[:, :20], x[:, :20])),
            2 * 81 * 20 * 12,
        ),
        (
            Does(lambda m, x: F.conv1d(x.mT, m.weight * 2, padding=1).mT, 12, 12, 3),
            81 * 12 * 12 * 3,
        ),
        (
            Does(lambda m, x: F.conv1d(x.mT, m.weight * 2, padding=1, groups=12).mT, 12, 1, 3),
            81 * 12 * 3,
        ),
        (
            Does(lambda m, x: F.conv_transpose1d(x.mT, m.weight * 2).mT, 12, 12, 3),
            81 * 12 * 12 * 3,
        ),
        (Does(_sdpa), 2 * 81 * 20 * 12),
        (nn.MultiheadAttention(12, 3, batch_first=True), None),
        (Asking(), (5 + 81 + 81 + 5) * 12 * 12 + 2 * 5 * 81 * 12),
        (Asking(kdim=12, vdim=12), (5 + 81 + 81 + 5) * 12 * 12 + 2 * 5 * 81 * 12),
        (Asking(add_bias_kv=True), (5 + 81 + 81 + 5) * 12 * 12 + 2 * 5 * 82 * 12),
        (
            nn.TransformerEncoderLayer(12, 3, 24, batch_first=True),
            81 * (4 * 12 * 12 + 2 * 12 * 24) + 2 * 81 * 81 * 12,
        ),
        (Recurrent(nn.LSTM(12, 12, batch_first=True)), 81 * 4 * 12 * (12 + 12)),
        (
            Recurrent(nn.LSTM(12, 6, batch_first=True, bidirectional=True, num_layers=2)),
            2 * 2 * 81 * 4 * 6 * (12 + 6),
        ),
        (
            Recurrent(nn.LSTM(12, 16, batch_first=True, proj_size=12)),
            81 * (4 * 16 * (12 + 12) + 12 * 16),
        ),
        (Recurrent(nn.GRU(12, 12, batch_first=True)), 81 * 3 * 12 * (12 + 12)),
        (Recurrent(nn.RNN(12, 12, batch_first=True)), 81 * 12 * (12 + 12)),
        (Steps(nn.LSTMCell(12, 12)), 4 * 12 * (12 + 12)),
        (Steps(nn.GRUCell(12, 12)), 3 * 12 * (12 + 12)),
        (Steps(nn.RNNCell(12, 12)), 12 * (12 + 12)),
    ],
)
def test_products_by_hand(inner: nn.Module, macs: int | None) -> None:
    if isinstance(inner, nn.MultiheadAttention):
        attention, macs = inner, 81 * 4 * 12 * 12 + 2 * 81 * 81 * 12
        inner = Does(lambda m, x: m.attention(x, x, x)[0])
        inner.attention = attention
    model = Around(inner).eval()
    assert count_cost(model, SIZE).macs == BOTH_ENDS + macs
    graph = ModelGraph(model, SIZE)
    assert graph.cost().macs == BOTH_ENDS + macs
    assert graph.uncounted == ()
    wide = sum(group.width for group in graph.groups)
    if wide:
        widths = {g.name: g.min_units * g.blocks for g in graph.groups}
        plan = random_plan(graph, 0.9 * (1 - graph.cost(widths).macs / graph.cost().macs))
        assert count_cost(graph.pruned(plan), SIZE).macs == plan.pruned.macs < graph.cost().macs


class Heads(nn.Module):
    """Self-attention of 3 heads of 4 channels, fused or by two products."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.num_heads, self.head_dim, self.fused = 3, 4, fused

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).view(1, -1, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("whole_heads", [True, False])
def test_an_attention_as_a_function_of_its_heads(fused: bool, whole_heads: bool) -> None:
    graph = ModelGraph(Around(Heads(fused)), SIZE, whole_heads=whole_heads)
    inner = next(g for g in graph.groups if g.name == "inner.qkv")
    assert inner.units == (3 if whole_heads else 4)
    for units in range(1, inner.units + 1):
        width = 12 * units // inner.units  # of queries, or keys, or values: all heads together
        expected = 81 * 12 * (3 * width + width) + 2 * 81 * 81 * width
        found = graph.cost({inner.name: units * inner.blocks}).macs
        assert found == BOTH_ENDS + expected


def test_half_means_half_of_the_work() -> None:
    model, size = build("vit_tiny_patch16_224")
    graph = ModelGraph(model, size)
    pruned = graph.pruned(random_plan(graph, 0.5))
    assert by_torch(pruned, size) / by_torch(model, size) == pytest.approx(0.5, abs=0.01)


ATTENTION = Around(Heads(fused=False)).eval()
ATTENTION_GRAPH = ModelGraph(ATTENTION, SIZE)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_the_cost_of_a_plan_is_that_of_the_model_really_pruned(data: st.DataObject) -> None:
    plan = random_widths_plan(ATTENTION_GRAPH, data)
    pruned = prune_(copy.deepcopy(ATTENTION), plan)
    assert plan.pruned.macs == count_cost(pruned, SIZE).macs == by_torch(pruned, SIZE)


class Lopsided(nn.Module):
    """Counts, by a product of its own, some channels of a group twice and others once."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.parts = nn.Linear(12, 9), (3, 3, 3)
        self.read = nn.Linear(81, 12)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.make(x).split(self.parts, -1)
        return self.read(torch.cat([a, b, c, a], -1) @ torch.cat([a, b, c, a], -1).mT)


def test_channels_that_cost_unequally_much_stay_or_are_counted_exactly() -> None:
    model = Around(Lopsided()).eval()
    graph = ModelGraph(model, SIZE)
    for seed in range(6):
        plan = random_plan(graph, 0.02, seed=seed)
        pruned = prune_(copy.deepcopy(model), plan)
        assert count_cost(pruned, SIZE).macs == plan.pruned.macs


def _scripted(x: Tensor) -> Tensor:
    return x @ x.transpose(1, 2) @ x


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        (torch.jit.script(_scripted), f"{2 * 81 * 81 * 12:,} multiply-adds in inner"),
        (lambda x: torch.fft.fft(x, dim=1).real, "the work of _fft_r2c in inner"),
        (lambda x: torch.cdist(x, x)[..., :12], "the work of _euclidean_dist in inner"),
        (lambda x: torch.cdist(x, x, p=1)[..., :12], "the work of _cdist_forward in inner"),
    ],
)
def test_work_that_is_not_counted_is_named(inner: Callable[[Tensor], Tensor], said: str) -> None:
    graph = ModelGraph(Around(Does(lambda m, x: inner(x))).eval(), SIZE)
    assert [line for line in graph.uncounted if said in line], graph.uncounted


def as_recorded_before(graph: ModelGraph, plan: PruningPlan) -> PruningPlan:
    """The plan with the multiply-adds of weights alone."""
    widths = {g.name: g.keep_width for g in plan.groups}
    dense, pruned = (graph._costs.of_weights(graph._units_gone(w))[0] for w in ({}, widths))
    return dataclasses.replace(
        plan,
        dense=dataclasses.replace(plan.dense, macs=dense),
        pruned=dataclasses.replace(plan.pruned, macs=pruned),
    )


def test_a_plan_recorded_without_products_is_replayed_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, size = build("vit_tiny_patch16_224")
    graph = ModelGraph(model, size)
    plan = random_plan(graph, 0.5)
    old = PruningPlan.from_json(as_recorded_before(graph, plan).to_json())
    assert old.dense.macs < plan.dense.macs
    new = graph.recounted(old)
    assert (new.dense, new.pruned, new.groups) == (plan.dense, plan.pruned, plan.groups)
    assert f"{old.dense.macs:,}" in new.notes[-1]
    assert graph.recounted(plan) is plan
    with caplog.at_level(logging.WARNING):
        first = prune_(copy.deepcopy(model), old)
    assert "without products" in caplog.text
    second = prune_(copy.deepcopy(model), plan).state_dict()
    assert all(torch.equal(v, second[k]) for k, v in first.state_dict().items())
    edited = dataclasses.replace(old, dense=dataclasses.replace(old.dense, macs=1))
    with pytest.raises(PlanError, match="edited by hand"):
        graph.recounted(edited)


def test_pure_convolutional_networks_cost_what_they_did() -> None:
    graph = ModelGraph(tiny_resnet(), (3, 32, 32))
    widths = {g.name: g.width // 2 for g in graph.groups}
    for some in ({}, widths):
        gone = graph._units_gone(some)
        assert graph._costs.of_weights(gone) == graph._costs.at(gone)
    assert graph.uncounted == ()


class Odd(nn.Module):
    """A convolution that can be pruned, before an attention and a Fourier transform that can't."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.rest = nn.Conv2d(3, 16, 1), Around(Does(_mixed))
        self.rest.first = nn.Conv2d(16, 12, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.rest(self.start(images).relu())


def _mixed(module: nn.Module, x: Tensor) -> Tensor:
    return x @ x.mT @ x + torch.fft.fft(x, dim=1).real


def test_compress_tells_of_uncounted_work_and_of_older_counts() -> None:
    import robust_prune as rp

    torch.manual_seed(0)
    data = torch.rand(64, *SIZE), torch.arange(64) % 4
    result = rp.compress(Odd().eval(), data, prune_ratio=0.02, allocation="uniform")
    assert any("_fft_r2c in rest.inner" in note for note in result.plan.notes)
    assert any("_fft_r2c in rest.inner" in note for note in result.report["notes"])
    graph = ModelGraph(Odd().eval(), SIZE)
    old = as_recorded_before(graph, result.plan)
    again = rp.compress(Odd().eval(), data, plan=old)
    assert again.plan.dense.macs == result.plan.dense.macs > old.dense.macs
    assert any("without products" in note for note in again.report["notes"])


def test_the_old_place_of_costs_works_and_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = importlib.import_module("robust_prune.costs")
    with pytest.warns(DeprecationWarning, match=r"now a part of robust_prune\.graph"):
        importlib.reload(old)
    assert old.count_cost is count_cost
