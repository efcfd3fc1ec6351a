"""What fuzzing has found, each as small as it could be made."""

from __future__ import annotations

import logging
import random
import struct
import time

import pytest
import torch
from torch import Tensor, nn

from robust_prune.errors import ModelError
from robust_prune.graph import ModelGraph, prune_
from tests.fuzz.changing import changed
from tests.fuzz.networks import Block, Drawn, Network
from tests.fuzz.readers import READERS, Folder
from tests.graph.test_graph import assert_pruned_is_masked, random_plan


class Halves(nn.Module):
    """Halves of a layer by a width that the code reads off: right where one of four goes."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4  # a number that is kept up to date, though nothing here reads it
        self.whole = nn.Conv2d(3, 8, 3)
        self.first = nn.Conv2d(4, 4, 1)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.whole(x))
        half = x.shape[1] // 2
        return self.out((self.first(x[:, :half]) * torch.sigmoid(x[:, half:])).mean((2, 3)))


def test_a_small_group_is_tried_with_few_and_with_many_channels_gone() -> None:
    model = Halves().eval()
    graph = ModelGraph(model, (3, 8, 8), min_width=1)
    assert [(g.name, g.blocks) for g in graph.groups] == [("whole", 2)]
    assert_pruned_is_masked(model, random_plan(graph, 0.6), torch.rand(2, 3, 8, 8))


class Insists(nn.Module):
    """One group that can be pruned, and one that the trial leaves out; no products."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(torch.relu(self.stem(x)))
        if x.shape[1] != 8:
            raise ValueError("eight channels, please")
        return self.out(x.mean((2, 3)))


def test_a_plan_of_a_graph_that_left_groups_out_is_replayed_without_a_note(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Insists().eval()
    graph = ModelGraph(model, (3, 8, 8))
    assert [g.name for g in graph.groups] == ["stem"]
    plan = random_plan(graph, 0.3)
    assert ModelGraph(model, (3, 8, 8), probe=False).recounted(plan) is plan
    with caplog.at_level(logging.WARNING):
        prune_(model, plan)
    assert not caplog.records


def test_a_transposed_convolution_may_read_what_an_attention_makes() -> None:
    """Its columns are the first dimension of its weight."""
    kinds = ("Mixer", 160), ("Attention", 1112), ("Upward", 160), ("Upward", 53)
    parts = tuple(Block(kind, 12, choices) for kind, choices in kinds)
    drawn = Drawn(parts, Block("convolution", 6, 631), 53)
    assert ModelGraph(Network(drawn).double().eval(), (3, 8, 8), min_width=1).groups


def test_what_breaks_a_large_network_is_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robust_prune.graph.probing.LARGE", 0)
    graph = ModelGraph(Insists().eval(), (3, 8, 8))
    assert [g.name for g in graph.groups] == ["stem"]


class TwoByTwo(nn.Module):
    """An attention of as many heads as a head has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.stem = nn.Conv2d(3, 4, 2, stride=2)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        n, t, _ = x.shape
        q, k, v = self.qkv(4 * x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        maps = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.out((maps @ v).transpose(1, 2).reshape(n, t, -1).mean(1))


def test_the_number_of_heads_stays_where_their_width_is_the_same_number() -> None:
    model = TwoByTwo().eval()
    graph = ModelGraph(model, (3, 8, 8), min_width=1, probe=False, protect=["stem"])
    assert [(g.name, g.blocks) for g in graph.groups] == [("qkv", 6)]
    assert_pruned_is_masked(model, random_plan(graph, 0.3), torch.rand(2, 3, 8, 8))


class Divided(nn.Module):
    """An attention whose code divides the input's width by the heads to know a head's."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.stem, self.norm = nn.Conv2d(3, 8, 2, stride=2), nn.LayerNorm(8)
        self.qkv, self.proj, self.out = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        maps = ((q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
        x = x + self.proj((maps @ v).transpose(1, 2).reshape(n, t, -1))
        return self.out(x.mean(1))


@pytest.mark.parametrize(("whole_heads", "blocks", "ratio"), [(False, 2, 0.3), (True, 4, 0.5)])
def test_widths_that_go_alike_in_a_trial_are_tried_apart_too(
    whole_heads: bool, blocks: int, ratio: float
) -> None:
    model = Divided().eval()
    graph = ModelGraph(model, (3, 8, 8), min_width=1, whole_heads=whole_heads)
    assert [g.blocks for g in graph.groups] == [blocks]
    assert_pruned_is_masked(model, random_plan(graph, ratio), torch.rand(2, 3, 8, 8))


def test_widths_are_tried_apart_where_attention_is_not_flat() -> None:
    """Two channels that are left are the same two numbers behind a layer norm, for most tokens."""
    drawn = Drawn(
        (Block("Operation", 8, 224), Block("Attention", 6, 231)), Block("linear", 6, 7481), 26
    )
    graph = ModelGraph(Network(drawn).double().eval(), (3, 8, 8), min_width=1)
    assert "parts.1.enter" not in {g.name for g in graph.groups if g.blocks == 1}


def test_what_is_right_beside_a_group_that_is_left_out_is_tried_without_it() -> None:
    """Halves of 12 channels by `shape // 2`, the first read in three groups: both go, or none."""
    kinds = (("Depthwise", 4, 137), ("Tied", 6, 1086), ("Chunks", 12, 13829), ("Chunks", 6, 20624))
    drawn = Drawn(tuple(Block(*kind) for kind in kinds), Block("convolution", 12, 4356), 2)
    graph = ModelGraph(Network(drawn).double().eval(), (3, 8, 8), min_width=1, whole_heads=True)
    assert [g.blocks for g in graph.groups if g.name.startswith("parts.3")] == [6]


def test_channels_that_are_all_silent_under_some_weights_hide_nothing() -> None:
    """An attention that takes its input's width for its own, behind two channels and a ReLU."""
    blocks = (Block("Attention", 6, 2402), Block("Chunks", 6, 4121))
    drawn = Drawn(blocks, Block("hidden", 6, 1032), 91)
    graph = ModelGraph(Network(drawn).double().eval(), (3, 8, 8), min_width=1, whole_heads=True)
    assert "parts.0.qkv" not in {g.name for g in graph.groups}


def test_what_is_wrong_by_a_millionth_is_no_rounding() -> None:
    """The same attention between layers that leave little of it: 3e-9 in the trial."""
    blocks = ("Chunks", 12, 348), ("Plain", 4, 31), ("Concatenation", 6, 18090)
    attention = Block("Attention", 6, 29078)
    drawn = Drawn((*(Block(*b) for b in blocks), attention), Block("hidden", 4, 3589), 2)
    graph = ModelGraph(Network(drawn).double().eval(), (3, 8, 8), min_width=1)
    assert "parts.3.qkv" not in {g.name for g in graph.groups}


class InSingle(nn.Module):
    """Sums in float32, whatever comes, as norms of many language models do."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.stem, self.out, self.wrong = nn.Conv2d(3, 64, 1), nn.Linear(64, 3), wrong

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((2, 3))
        single = x.float()
        total = single.sum(1, keepdim=True) + (1e-4 * x.shape[1] if self.wrong else 0)
        return self.out((single * total).to(x.dtype))


@pytest.mark.parametrize("wrong", [False, True])
def test_code_that_computes_in_float32_is_given_its_rounding(wrong: bool) -> None:
    graph = ModelGraph(InSingle(wrong), (3, 8, 8))
    assert len(graph.groups) == (0 if wrong else 1)


class Divides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.out((x * (x.shape[1] // 8) ** -0.5).mean((2, 3)))


def test_a_division_by_zero_while_a_group_is_tried_leaves_the_group_out() -> None:
    graph = ModelGraph(Divides(), (3, 8, 8))
    assert not graph.groups
    assert "does not run when it is pruned" in graph.unprunable[0].reason


def test_a_shard_with_a_name_too_long_for_a_file_is_one_line() -> None:
    places = '{"weight_map": {"fc.weight": "' + "a" * 600 + '"}}'
    with pytest.raises(ModelError, match="is no file beside it"):
        READERS["shards"](places.encode(), Folder())


def test_a_text_in_json_is_changed_as_bytes_are() -> None:
    """Its letters are no places that could hold another value."""
    for seed in range(20):
        assert isinstance(changed(b'"abc"', random.Random(seed)), bytes)


def test_a_part_of_an_archive_on_several_disks_is_one_line() -> None:
    locator = b"PK\x06\x07" + struct.pack("<LQL", 1, 0, 2)
    data = locator + b"PK\x05\x06" + bytes(18)
    with pytest.raises(ModelError, match="a broken archive"):
        READERS["checkpoint"](data, Folder())


def test_a_name_of_any_length_in_a_pickle_is_refused_at_once() -> None:
    """torch.load searches its message, in which the name stands, in quadratic time."""
    begun = time.perf_counter()
    with pytest.raises(ModelError, match="can run any code"):
        READERS["pickle"](b"\x80\x02c" + b"a" * 30_000 + b"\nb\n.", Folder())
    assert time.perf_counter() - begun < 5
