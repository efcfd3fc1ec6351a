"""Branches that a pass in train mode alone runs: pruned with what they read, or kept whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.graph import ModelGraph, prune_
from tests.conftest import OwnNet
from tests.graph.test_graph import random_plan

SIZE = (3, 32, 32)


def stage(channels: int, width: int) -> nn.Sequential:
    layers = nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    return nn.Sequential(*layers)


class Plain(nn.Module):
    """Two stages and a classifier; subclasses do more with the first stage's maps in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = stage(3, 16), stage(16, 32), nn.Linear(32, 10)

    def maps(self, x: Tensor) -> Tensor:
        return x

    def more(self, x: Tensor, logits: Tensor) -> object:
        return logits

    def forward(self, images: Tensor) -> object:
        x = self.first(images)
        if self.training:
            x = self.maps(x)
        logits = self.out(self.second(x).mean((2, 3)))
        return self.more(x, logits) if self.training else logits


class AuxiliaryHead(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(16, 10)

    def more(self, x: Tensor, logits: Tensor) -> Tensor:
        return logits + 0.1 * self.aux(x.mean((2, 3)))


class DeepHead(Plain):
    """Several layers, and a tuple of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 10, 1))

    def more(self, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits, self.aux(x).mean((2, 3))


class Parameters(Plain):
    """No module is called in train mode alone, only functions on parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(10, 16))
        self.gain = nn.Parameter(torch.ones(1, 16, 1, 1))

    def maps(self, x: Tensor) -> Tensor:
        return x * self.gain

    def more(self, x: Tensor, logits: Tensor) -> Tensor:
        return logits + F.linear(x.mean((2, 3)), self.matrix)


class SizesInCode(Plain):
    def maps(self, x: Tensor) -> Tensor:
        return x.view(len(x), 4, 4, 16, 16).flip(1).reshape(len(x), 16, 16, 16)


class BatchesOnly(AuxiliaryHead):
    def more(self, x: Tensor, logits: Tensor) -> Tensor:
        return logits + self.aux(F.batch_norm(x.mean((2, 3)), None, None, training=True))


class Counting(Plain):
    """Changes itself in train mode, and draws at random."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(16))
        self.passes = 0

    def maps(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.seen += x.detach().mean((0, 2, 3))
        return x + torch.randn(16).view(1, 16, 1, 1)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Plain, ["first.0", "second.0"]),
        (AuxiliaryHead, ["first.0", "second.0"]),
        (DeepHead, ["first.0", "second.0"]),
        (Parameters, ["first.0", "second.0"]),
        (BatchesOnly, ["first.0", "second.0"]),
        (SizesInCode, ["second.0"]),
        (Counting, ["second.0"]),
    ],
)
def test_a_pruned_network_runs_in_train_mode(kind: type[Plain], names: list[str]) -> None:
    torch.manual_seed(0)
    net = kind().eval()
    graph = ModelGraph(net, SIZE)
    assert [group.name for group in graph.groups] == names
    prune_(net, random_plan(graph, 0.5))
    assert net.second[0].out_channels < 32
    net.train()(torch.rand(4, *SIZE))


def test_what_train_mode_alone_makes_stays_whole() -> None:
    graph = ModelGraph(DeepHead().eval(), SIZE)
    reasons = {item.name: item.reason for item in graph.unprunable}
    assert reasons["aux.0"] == "only a pass in train mode uses it"
    assert reasons["aux.2"] == "its channels are the model's outputs"
    assert graph.groups[0].readers == ("second.0", "aux.0")


def test_multiply_adds_are_those_of_eval_mode() -> None:
    torch.manual_seed(0)
    costs = [ModelGraph(kind().eval(), SIZE).cost() for kind in (Plain, AuxiliaryHead)]
    assert costs[0].macs == costs[1].macs
    assert costs[1].params == costs[0].params + 170


def test_the_pass_in_train_mode_leaves_no_trace() -> None:
    net = Counting().train()
    net.out.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()
    ModelGraph(net, SIZE)
    assert net.passes == 0
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(tensor, before[n]) for n, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_network_that_never_ran_in_train_mode_is_pruned_as_before() -> None:
    class Broken(Plain):
        def more(self, x: Tensor, logits: Tensor) -> object:
            raise RuntimeError("not in train mode")

    graphs = [ModelGraph(kind().eval(), SIZE) for kind in (Plain, Broken)]
    assert graphs[0].groups == graphs[1].groups


def test_ordinary_networks_have_nothing_more_in_train_mode() -> None:
    from robust_prune.graph.example import Example
    from robust_prune.graph.tracing import couple

    example = Example(torch.rand(1, 3, 16, 16))
    for net in (OwnNet(), nn.Sequential(stage(3, 8), nn.Dropout(), nn.Flatten())):
        pair = example.paired()
        for shapes in (pair.without_values(), Example(None)):  # the latter can't be run
            runs = pair.run, shapes.run
            assert not couple(net.eval(), example.run, {}, train_runs=runs).trains


def test_shapes_of_norms_are_known_without_computing_them() -> None:
    from robust_prune.graph.tracing.training import _Calls

    maps = torch.empty(2, 8, 4, 4, device="meta")
    with _Calls({}) as calls:
        normed = F.layer_norm(F.batch_norm(maps, None, None, training=True), (4, 4))
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            F.batch_norm(maps[:1, :, 0, 0], None, None, training=True)
    assert normed.shape == maps.shape
    assert normed.is_meta
    assert {name for _, name, _ in calls.found} >= {"batch_norm", "layer_norm"}
