"""Channel scores against definitions written out by hand."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

from robust_prune.adversaries import AdversarialSet
from robust_prune.criteria import channel_scores
from robust_prune.criteria import scores as scores
from robust_prune.errors import UsageError
from robust_prune.graph import ModelGraph
from robust_prune.types import ThreatModel
from tests.conftest import OwnNet, randomize_, tiny_resnet
from tests.graph.test_tracing import build


def scores_of(graph: ModelGraph, model: torch.nn.Module, score: str, **more: object) -> dict:
    return channel_scores(
        model,
        graph,
        score=score,  # type: ignore[arg-type]
        **more,  # type: ignore[arg-type]
    )


def test_l2_of_a_channel_inside_a_block() -> None:
    model = tiny_resnet()
    block = model.net.layer2[0]
    found = scores_of(ModelGraph(model, (3, 32, 32)), model, "l2")["layer2.0.conv1"]
    rows = block.conv1.weight.double().flatten(1).square().sum(1)
    columns = block.conv2.weight.double().transpose(0, 1).flatten(1).square().sum(1)
    torch.testing.assert_close(found, (rows + columns).sqrt().detach())


def test_taylor_is_the_derivative_of_a_gate_on_the_channel() -> None:
    model = randomize_(OwnNet(width=8)).double().eval()
    images, labels = torch.rand(6, 3, 16, 16).double(), torch.randint(0, 5, (6,))
    adversarial = AdversarialSet(images, labels, ThreatModel.linf(0.03), "given", 0, 3)
    graph = ModelGraph(model, (3, 16, 16))
    found = scores_of(graph, model, "taylor", adversarial=adversarial)["hidden"]
    expected = torch.zeros(20).double()
    for part, target in adversarial.batches():
        gate = torch.ones(20, requires_grad=True, dtype=torch.float64)
        handle = model.hidden.register_forward_hook(lambda m, i, o, g=gate: o * g)
        # the gate sits before a ReLU, which passes a factor at 1 through unchanged
        loss = F.cross_entropy(model(part), target)
        handle.remove()
        (slope,) = torch.autograd.grad(loss, gate)
        expected += 0.5 * slope.square()
    torch.testing.assert_close(found, expected)


def test_taylor_predicts_what_removing_a_channel_does() -> None:
    model = randomize_(OwnNet(width=8)).double().eval()
    images, labels = torch.rand(8, 3, 16, 16).double(), torch.randint(0, 5, (8,))
    adversarial = AdversarialSet(images, labels, ThreatModel.linf(0.03), "given", 0, 8)
    found = scores_of(ModelGraph(model, (3, 16, 16)), model, "taylor", adversarial=adversarial)[
        "hidden"
    ].sqrt()
    with torch.no_grad():
        weight = model.out.weight
        before = F.cross_entropy(model(images), labels)
        step = 1e-4
        for unit in range(20):
            weight[:, unit] *= 1 - step
            slope = (F.cross_entropy(model(images), labels) - before).abs() / step
            weight[:, unit] /= 1 - step
            assert float(slope) == pytest.approx(float(found[unit]), rel=0.02, abs=1e-6)


def test_a_grouped_convolution_is_scored_by_unit() -> None:
    model = randomize_(OwnNet(width=8)).eval()
    graph = ModelGraph(model, (3, 16, 16))
    first = next(g for g in graph.groups if g.name == "first")
    assert (first.blocks, first.units) == (4, 2)
    assert scores_of(graph, model, "l2")["first"].shape == (2,)


def test_taylor_without_images_is_an_error() -> None:
    model = tiny_resnet()
    with pytest.raises(UsageError, match="needs adversarial images"):
        scores_of(ModelGraph(model, (3, 32, 32)), model, "taylor")


def test_taylor_of_an_attentions_dims_is_the_derivative_of_gates_on_queries_and_values() -> None:
    model, size = build("vit_tiny_patch16_224")
    model = model.double()
    images, labels = torch.rand(4, *size).double(), torch.randint(0, 10, (4,))
    adversarial = AdversarialSet(images, labels, ThreatModel.linf(0.03), "given", 0, 4)
    graph = ModelGraph(model, size)
    found = scores_of(graph, model, "taylor", adversarial=adversarial)["blocks.0.attn.qkv"]
    gate = torch.ones(64, requires_grad=True, dtype=torch.float64)

    def gated(module: torch.nn.Module, inputs: object, out: torch.Tensor) -> torch.Tensor:
        q, k, v = out.unflatten(-1, (3, 3, 64)).unbind(-3)
        return torch.stack([q * gate, k, v * gate], -3).flatten(-3)

    handle = model.net.blocks[0].attn.qkv.register_forward_hook(gated)
    loss = F.cross_entropy(model(images), labels)
    handle.remove()
    (slope,) = torch.autograd.grad(loss, gate)
    torch.testing.assert_close(found, slope.square())


@pytest.mark.parametrize("arch", ["own", "resnet", "mobilevit_xxs"])
def test_fisher_is_half_of_taylor_image_by_image(arch: str) -> None:
    models = {
        "own": lambda: randomize_(OwnNet(width=8)),
        "resnet": lambda: tiny_resnet(num_classes=5),
        "mobilevit_xxs": lambda: build("mobilevit_xxs")[0],
    }
    model = models[arch]().double().eval()
    size = 64 if arch == "mobilevit_xxs" else 32
    images, labels = torch.rand(4, 3, size, size).double(), torch.randint(0, 5, (4,))
    whole = AdversarialSet(images, labels, ThreatModel.linf(0.03), "given", 0, 3)
    single = AdversarialSet(images, labels, ThreatModel.linf(0.03), "given", 0, 1)
    graph = ModelGraph(model, (3, size, size))
    found = scores_of(graph, model, "fisher", adversarial=whole)
    expected = scores_of(graph, model, "taylor", adversarial=single)
    compared = 0
    for group in graph.groups:
        if not graph.gates(group.name):
            torch.testing.assert_close(found[group.name], 0.5 * expected[group.name])
            compared += 1
    assert compared >= 2
    assert not images.requires_grad


def test_fisher_adds_up_the_calls_of_a_layer_that_is_used_twice() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
            self.shared = torch.nn.Conv2d(8, 4, 1)
            self.out = torch.nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.first(input=x))
            both = self.shared(input=x) + self.shared(input=torch.roll(x, 1, 2) ** 2)
            return self.out(torch.relu(both).mean((2, 3)))

    torch.manual_seed(0)
    model = Twice().double().eval()
    images, labels = torch.rand(4, 3, 8, 8).double(), torch.randint(0, 5, (4,))
    single = AdversarialSet(images, labels, ThreatModel.linf(0.03), "given", 0, 1)
    graph = ModelGraph(model, (3, 8, 8))
    found = scores_of(graph, model, "fisher", adversarial=single)
    expected = scores_of(graph, model, "taylor", adversarial=single)
    torch.testing.assert_close(found["first"], 0.5 * expected["first"])


def test_reconstruction_is_the_error_that_least_squares_can_not_mend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module("robust_prune.criteria.scores.reconstruction")
    monkeypatch.setattr(module, "DAMPING", 0.0)
    torch.manual_seed(1)
    model = randomize_(OwnNet(width=8)).double().eval()
    model.hidden.bias.data += 1  # no unit is dead
    images, labels = torch.rand(64, 3, 16, 16).double(), torch.randint(0, 5, (64,))
    adversarial = AdversarialSet(images, labels, ThreatModel.linf(0.03), "given", 0, 64)
    graph = ModelGraph(model, (3, 16, 16))
    found = scores_of(graph, model, "reconstruction", adversarial=adversarial)["hidden"]
    seen: list[torch.Tensor] = []
    handle = model.out.register_forward_hook(lambda m, i, o: seen.extend((i[0], o)))
    model(images)
    handle.remove()
    x = (seen[0] - seen[0].mean(0)).detach()
    y = (seen[1] - seen[1].mean(0)).detach()
    for unit in range(20):
        rest = [u for u in range(20) if u != unit]
        solved = torch.linalg.lstsq(x[:, rest], y).solution
        lost = (y - x[:, rest] @ solved).square().sum() / y.square().sum()
        assert float(found[unit]) == pytest.approx(float(lost), rel=1e-6)


@pytest.mark.parametrize("score", ["fisher", "reconstruction"])
def test_measured_scores_leave_the_model_alone_and_need_images(score: str) -> None:
    model = tiny_resnet()
    graph = ModelGraph(model, (3, 32, 32))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    adversarial = AdversarialSet(
        torch.rand(4, 3, 32, 32), torch.arange(4), ThreatModel.linf(0.03), "given", 0, 2
    )
    found = scores_of(graph, model, score, adversarial=adversarial)
    assert all(found[g.name].shape == (g.units,) for g in graph.groups)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(UsageError, match="needs adversarial"):
        scores_of(graph, model, score)
