"""Residual blocks that go whole: which can, and that the rest is the masked model."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

import robust_prune
from robust_prune.errors import ModelError, PlanError
from robust_prune.finetune import TrainingConfig, optimizer_of
from robust_prune.graph import ModelGraph, count_cost, masking_error
from robust_prune.models import build_model, resolve_spec
from robust_prune.modules import EmptyBlock, EmptyForm, ImageModel, empty_blocks, network_of
from robust_prune.types import Budget, GroupPlan, PruningPlan, ThreatModel
from tests.conftest import randomize_, tiny_resnet

SIZE = (3, 64, 64)


def plan_of(graph: ModelGraph, widths: Mapping[str, int]) -> PruningPlan:
    """The plan that keeps the first units of every group."""
    groups = tuple(
        GroupPlan(
            g.name,
            g.width,
            tuple(i for i in range(g.width) if g.unit(i) < widths.get(g.name, g.width) // g.blocks),
        )
        for g in graph.groups
    )
    cost = graph.cost({g.name: g.keep_width for g in groups})
    shape = graph.input_size
    return PruningPlan(
        Budget("macs", 0.5),
        "by hand",
        "first",
        0,
        shape,
        graph.cost(),
        cost,
        groups,
        ties=graph.ties,
        blocks=tuple(b.name for b in graph.blocks if not any(widths.get(g, 1) for g in b.groups)),
    )


def half_without(graph: ModelGraph, blocks: slice = slice(None)) -> PruningPlan:
    """The plan that takes these blocks away, and half of every other group."""
    gone = {group for block in graph.blocks[blocks] for group in block.groups}
    half = {g.name: max(g.blocks, g.width // 2 // g.blocks * g.blocks) for g in graph.groups}
    return plan_of(graph, half | dict.fromkeys(gone, 0))


def named(pattern: str, *counts: int, first: int = 0) -> list[str]:
    """Names of blocks by stage, and by place in it."""
    places = ((stage, place) for stage, n in enumerate(counts) for place in range(first, n))
    return [pattern.format(stage, place) for stage, place in places]


LAYERS = [f"layer{stage}.{place}" for stage in range(1, 5) for place in range(2)]
FAMILIES = {
    "resnet18": LAYERS,
    "resnet26": LAYERS,
    "mobilevit_xxs": [
        *("stages.0.0", "stages.1.1", "stages.1.2"),
        *named("stages.{}.1.transformer.{}", 0, 0, 2, 4, 3),
    ],
    "convnext_atto": named("stages.{}.blocks.{}", 2, 2, 6, 2),
    "resnetv2_50": named("stages.{}.blocks.{}", 3, 4, 6, 3, first=1),
    "mobilenetv3_small_050": [
        *("blocks.1.1", "blocks.2.1", "blocks.2.2", "blocks.3.0", "blocks.3.1"),
        *("blocks.4.1", "blocks.4.2"),
    ],
}


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_model_without_blocks_is_the_masked_one(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(resolve_spec(arch, {"num_classes": 5})).eval()
    randomize_(model)
    graph = ModelGraph(model, SIZE, probe=False)
    assert [block.name for block in graph.blocks] == FAMILIES[arch]
    plan = PruningPlan.from_json(half_without(graph, slice(None, None, 2)).to_json())
    pruned = graph.pruned(plan)
    assert masking_error(model, pruned, plan, torch.rand(2, *SIZE)) < 1e-7  # constants in float32
    assert list(empty_blocks(pruned.net)) == FAMILIES[arch][::2]  # type: ignore[union-attr]
    assert count_cost(pruned, SIZE).macs == plan.pruned.macs < graph.cost().macs / 2

    images = torch.rand(2, *SIZE)
    robust_prune.save(pruned, tmp_path / "small.safetensors")
    again = robust_prune.load(tmp_path / "small.safetensors")
    assert torch.equal(again(images), pruned(images))


def test_what_is_left_is_pruned_again() -> None:
    torch.manual_seed(0)
    model = randomize_(timm.create_model("resnet18", num_classes=5)).eval()
    graph = ModelGraph(model, SIZE, probe=False)
    once = graph.pruned(half_without(graph, slice(None, None, 2)))
    again = ModelGraph(once, SIZE)
    assert [block.name for block in again.blocks] == FAMILIES["resnet18"][1::2]
    assert {g.name for g in again.groups} > {"conv1"}  # the sum that constants are added to
    plan = half_without(again, slice(0, 1))
    twice = again.pruned(plan)
    assert masking_error(once, twice, plan, torch.rand(2, *SIZE)) < 1e-7
    constant = twice.get_submodule("layer1.0").constant
    assert constant.shape == (16,)
    assert len(empty_blocks(twice)) == 5


class Block(nn.Module):
    """A residual block of one's own, that ends in a function."""

    def __init__(self, width: int, out: int, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, out, 1)
        self.shortcut = nn.Conv2d(width, out, 1) if out != width else nn.Sequential()
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        y += self.shortcut(x)
        return self.end(y)


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module, out: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(blocks)
        self.fc = nn.Linear(out, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def blocks_of(*blocks: nn.Module, out: int = 8) -> list[str]:
    torch.manual_seed(0)
    graph = ModelGraph(randomize_(Net(*blocks, out=out)).eval(), (3, 8, 8), min_width=1)
    return [f"{block.form.skip}+{block.form.tail}" for block in graph.blocks]


def test_blocks_of_ones_own() -> None:
    relu, silu = Block(8, 8, F.relu), Block(8, 12, F.silu)
    torch.manual_seed(0)
    net = randomize_(Net(relu, silu, out=12)).eval()
    graph = ModelGraph(net, (3, 8, 8), min_width=1)
    forms = {block.name: (block.form.skip, block.form.tail) for block in graph.blocks}
    assert forms == {"blocks.0": ("", "relu"), "blocks.1": ("shortcut", "silu")}
    plan = half_without(graph)
    pruned = graph.pruned(plan)
    assert masking_error(net, pruned, plan, torch.rand(2, 3, 8, 8)) < 1e-7
    assert "blocks.1.shortcut.weight" in pruned.state_dict()  # under the name that it had


class Bordered(Block):
    """What its branch adds without channels differs at the border, as a layer reads its sum."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv2(F.relu(self.conv1(x)))
        return F.relu(x + z + self.conv3(z))


class Gated(Block):
    """Its branch multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv2(F.relu(self.conv1(x))).sigmoid()


class Twice(Block):
    """Its branch reads what the skip is not: another channel group has a way around it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))) + x.mean((2, 3), keepdim=True))


class Clamped(Block):
    """What bites at large inputs alone."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.conv2(F.relu(self.conv1(x)))).clamp(-30, 30)


class Named(Block):
    """A part of it has a name that says nothing."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.skip = self.__dict__["_modules"].pop("shortcut")

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.conv2(F.relu(self.conv1(x))) + self.skip(x))


class Last(nn.Module):
    """Channels last, with or without biases, which may be zero."""

    def __init__(self, bias: bool, width: int = 8) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 6, bias), nn.Linear(6, width, bias)
        for layer in (self.fc1, self.fc2) if bias else ():
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x)))


class Turned(nn.Module):
    """A block for images whose channels come last inside of it alone."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.blocks(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))
        return logits


@pytest.mark.parametrize("bias", [True, False])
def test_channels_may_come_last_whatever_the_biases_are(bias: bool) -> None:
    torch.manual_seed(0)
    net = Turned(Last(bias), Last(bias)).eval()
    graph = ModelGraph(net, (3, 8, 8), min_width=1)  # as many rows as channels
    assert [block.form.last for block in graph.blocks] == [True, True]
    plan = half_without(graph)
    pruned = graph.pruned(plan)
    assert pruned.get_submodule("blocks.0").constant.shape == (4,)
    assert masking_error(net, pruned, plan, torch.rand(2, 3, 8, 8)) < 1e-7


class Inside(Last):
    """Channels come last inside of the block alone, as in ConvNeXt's."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        return x + (super().forward(rows) - rows).permute(0, 3, 1, 2)


def test_a_layer_on_rows_says_nothing_of_the_sum() -> None:
    torch.manual_seed(0)
    graph = ModelGraph(Net(Inside(bias=True)).eval(), (3, 8, 8), min_width=1)
    assert [block.form.last for block in graph.blocks] == [False]


def test_a_skip_may_be_called_so() -> None:
    torch.manual_seed(0)
    net = randomize_(Net(Named(8, 12, F.relu), out=12)).eval()
    graph = ModelGraph(net, (3, 8, 8), min_width=1)
    assert [block.form.skip for block in graph.blocks] == ["skip"]
    plan = half_without(graph)
    pruned = graph.pruned(plan)
    assert "blocks.0.skip.weight" in pruned.state_dict()
    assert masking_error(net, pruned, plan, torch.rand(2, 3, 8, 8)) < 1e-7


class Projected(Block):
    """As many channels go in as come out, by a projection; the norm of the input comes last."""

    def __init__(self) -> None:
        super().__init__(8, 8, nn.Identity())
        self.shortcut, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(self.norm(x)))) + self.shortcut(x)


class Upwards(Block):
    """Its branch ends in a transposed convolution, whose outputs are its second dimension."""

    def __init__(self) -> None:
        super().__init__(8, 8, nn.Identity())
        self.conv2 = nn.ConvTranspose2d(6, 8, 1, bias=False)


@pytest.mark.parametrize("kind", [Projected, Upwards])
@pytest.mark.parametrize("stem", [2, 8])
def test_the_constant_follows_the_channels_of_the_sum(kind: Any, stem: int) -> None:
    torch.manual_seed(0)
    net = randomize_(Net(kind(), Block(8, 8, F.relu))).eval()
    graph = ModelGraph(net, (3, 8, 8), min_width=1)
    widths = {g.name: g.width // 2 for g in graph.groups} | {"stem": stem}
    plan = plan_of(graph, widths | dict.fromkeys(graph.blocks[0].groups, 0))
    assert masking_error(net, graph.pruned(plan), plan, torch.rand(2, 3, 8, 8)) < 1e-7
    assert graph.blocks[0].name == "blocks.0"


class Around(Net):
    """A network that does more with its blocks than to call them."""

    def __init__(self, what: str) -> None:
        super().__init__(Block(8, 8, nn.Identity()), Block(8, 8, nn.Identity()))
        self.what = what
        self.first = self.blocks[0] if what == "another name" else None
        self.act = nn.PReLU() if what == "shared" else nn.ReLU()
        self.blocks[0].flag, self.blocks[0].act = True, self.act
        self.blocks[1].act = self.act

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        kept = x
        if self.what == "attribute" and not self.blocks[0].flag:
            return x
        for i, block in enumerate(self.blocks):
            before = x
            x = (self.first or block)(x) if i == 0 else block(x)
            if self.what == "in place":
                before.copy_(x)
        logits: Tensor = self.fc((x + kept).mean((2, 3)))
        return logits


class Slopes(Block):
    """An activation that others share is a part of it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.conv1(x)))


@pytest.mark.parametrize("what", ["another name", "attribute"])
def test_a_block_that_is_more_than_called_stays(what: str) -> None:
    torch.manual_seed(0)
    graph = ModelGraph(randomize_(Around(what)).eval(), (3, 8, 8), min_width=1)
    assert [block.name for block in graph.blocks] == ["blocks.1"]


def test_a_block_with_weights_of_others_stays() -> None:
    torch.manual_seed(0)
    net = Net(Slopes(8, 8, nn.Identity()), Slopes(8, 8, nn.Identity()))
    net.blocks[0].act = net.blocks[1].act = nn.PReLU()
    graph = ModelGraph(randomize_(net).eval(), (3, 8, 8), min_width=1)
    assert [block.name for block in graph.blocks] == ["blocks.1"]  # the slope is the other's
    plan = half_without(graph)
    assert masking_error(net, graph.pruned(plan), plan, torch.rand(2, 3, 8, 8)) < 1e-7


class Written(nn.Module):
    """Adds to its very input, which its caller reads afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x += self.conv2(F.relu(self.conv1(x)))
        return x


class Reading(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        read = [x]
        for block in self.blocks:
            read.append(block(read[-1].clone() if len(read) > 1 else x))
        logits: Tensor = self.fc((read[0] + 2 * read[-1]).mean((2, 3)))
        return logits


def test_a_block_that_writes_into_what_others_read_stays() -> None:
    torch.manual_seed(0)
    graph = ModelGraph(Reading(Written(), Written()).eval(), (3, 8, 8), min_width=1)
    assert [block.name for block in graph.blocks] == ["blocks.1"]


def test_constants_decay_no_more_than_biases_do() -> None:
    graph = ModelGraph(tiny_resnet(), (3, 32, 32))
    pruned = graph.pruned(half_without(graph))
    optimizer = optimizer_of(
        pruned, TrainingConfig(threat=ThreatModel.linf("8/255"), method="pgd-at", epochs=1)
    )
    decayed = [p for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]]
    constants = [block.constant for block in empty_blocks(network_of(pruned)).values()]
    assert len(constants) == 4
    assert not {id(p) for p in decayed} & {id(p) for p in constants}


@pytest.mark.parametrize("kind", [Bordered, Clamped, Gated, Twice])
def test_what_is_more_than_a_skip_and_a_constant_stays(kind: type[Block]) -> None:
    assert blocks_of(kind(8, 8, F.relu)) == []
    assert blocks_of(kind(8, 8, F.relu), Block(8, 8, F.relu)) == ["+relu"]


def test_a_block_that_runs_twice_stays() -> None:
    block = Block(8, 8, F.relu)
    assert blocks_of(block, block) == []


def test_a_block_with_a_protected_layer_stays() -> None:
    net = timm.create_model("resnet18", num_classes=5).eval()
    graph = ModelGraph(net, SIZE, probe=False, protect=["layer3.1.conv2"])
    names = {block.name for block in graph.blocks}
    assert "layer3.0" in names
    assert "layer3.1" not in names


def test_a_plan_that_empties_what_is_no_block_is_refused() -> None:
    model = randomize_(timm.create_model("resnet26", num_classes=5)).eval()
    graph = ModelGraph(model, SIZE, probe=False)
    block = graph.blocks[1]
    assert len(block.groups) == 2
    whole = plan_of(graph, dict.fromkeys(block.groups, 0))
    before = copy.deepcopy(model.state_dict())
    stream = next(g.name for g in graph.groups if g.name not in graph.blocks[0].groups)
    for name in (block.groups[0], stream):  # half of a block; what no block has inside
        groups = tuple(
            dataclasses.replace(g, keep=() if g.name == name else tuple(range(g.width)))
            for g in whole.groups
        )
        with pytest.raises(PlanError, match=r"nothing is kept of .* keep at least one channel"):
            ModelGraph(model, SIZE, probe=False).apply_(dataclasses.replace(whole, groups=groups))
    with pytest.raises(PlanError, match="other blocks empty than it says"):
        graph.apply_(dataclasses.replace(whole, blocks=()))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_constant_stands_for_all_that_a_branch_gives_at_zero() -> None:
    block = EmptyBlock(EmptyForm("", "relu"), torch.tensor([1.0, -2.0]))
    x = torch.tensor([[[[-3.0]], [[5.0]]]])
    assert_close(block(x).flatten(), torch.tensor([0.0, 3.0]))


@pytest.mark.parametrize(
    ("empty", "says"),
    [
        ({"layer9.0": {}}, "no block 'layer9.0' to leave empty"),
        ({"layer2.0": {"skip": "no"}}, "no part 'no' that skips"),
        ({"layer1.0": {"tail": "system"}}, "Invalid enum value"),
        ({"layer1.0": {"skip": 3}}, "Expected `str`"),
        ({"layer1": {"tail": "relu"}}, "malformed|does not fit"),
        ({"": {}}, "malformed"),
        ({"layer3": {}, "layer3.0.conv1": {}}, "lies in another that is to be left empty"),
        ({"layer2.0": {"skip": "constant"}}, "no part 'constant' that skips"),
    ],
)
def test_a_file_that_empties_what_is_not_there_is_refused(
    empty: object, says: str, tmp_path: Path
) -> None:
    model = build_model(resolve_spec("resnet18", {"num_classes": 5}))
    graph = ModelGraph(model, SIZE, probe=False)
    pruned = graph.pruned(half_without(graph, slice(0, 1)))
    assert isinstance(pruned, ImageModel)
    path = robust_prune.save(pruned, tmp_path / "small.safetensors")
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["robust_prune"])
    tensors = load_file(path)
    text = json.dumps(manifest | {"empty": empty})
    save_file(tensors, path, metadata={"robust_prune": text})
    with pytest.raises(ModelError, match=says) as caught:
        robust_prune.load(path)
    assert str(path) in str(caught.value)
