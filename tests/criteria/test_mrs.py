"""MRS: closed form on a linear model, first order against the ascent, and the cost."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robust_prune.adversaries import AdversarialSet, adversarial_set
from robust_prune.criteria import ascent, curves, first_order, measure_mrs, sensitivities
from robust_prune.criteria.mrs import group_sensitivity
from robust_prune.errors import ModelError
from robust_prune.graph import ModelGraph
from robust_prune.types import ChannelGroup, ThreatModel
from tests.conftest import tiny_resnet
from tests.oracles import linear_classifier, near_middle

RHO = 0.1


def fixed_set(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> AdversarialSet:
    return AdversarialSet(images, labels, ThreatModel.linf("8/255"), "given", 0, len(images))


def linear_problem() -> tuple[torch.nn.Module, AdversarialSet]:
    model = linear_classifier(seed=3)
    images = near_middle(1, model.shape, seed=4)
    return model, fixed_set(model, images, 1 - model(images).argmax(1))


def test_first_order_is_the_closed_form_of_a_linear_model() -> None:
    model, adversarial = linear_problem()
    x, y = adversarial.images.flatten(1), int(adversarial.labels[0])
    p = model(adversarial.images).softmax(1)[0, y].detach()
    # dL/dW = (softmax - onehot) x^T, of Frobenius norm sqrt(2) * (1 - p) * |x| with two classes
    gradient = 2**0.5 * (1 - p) * x.norm()
    expected = RHO * model.layer.weight.detach().norm() * gradient
    loss, values = first_order(model, adversarial, rho=RHO)
    assert values["layer"] == pytest.approx(float(expected), rel=1e-9)
    assert loss == pytest.approx(float(-p.log()), rel=1e-9)


def test_ascent_finds_the_exact_maximum_of_a_linear_model() -> None:
    # one image: the loss depends on W only through the margin, whose largest change over the ball
    # is radius * |x| * sqrt(2), so the maximum is known
    model, adversarial = linear_problem()
    x, y = adversarial.images.flatten(1), int(adversarial.labels[0])
    logits = model(adversarial.images).detach()[0]
    margin = logits[y] - logits[1 - y]
    radius = RHO * model.layer.weight.detach().norm()
    worst = margin - 2**0.5 * radius * x.norm()
    expected = F.softplus(-worst) - F.softplus(-margin)
    _, values = ascent(model, adversarial, rho=RHO, epochs=30)
    assert values["layer"] == pytest.approx(float(expected), rel=1e-6)


def test_a_batch_without_a_gradient_does_not_end_the_climb() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    images = torch.cat([torch.zeros(1, 1, 2, 2), torch.rand(1, 1, 2, 2)])  # zeros have none
    labels = torch.tensor([0, 1])
    adversarial = AdversarialSet(images, labels, ThreatModel.linf("8/255"), "given", 0, 1)
    assert ascent(model, adversarial, rho=RHO, epochs=3)[1]["1"] > 0


def test_gradients_that_are_not_finite_are_an_error_of_either_estimator() -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1, bias=False)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.conv(images).square().sum((2, 3)).sqrt()  # no gradient at nought

    model, size = Norms(), torch.zeros(2, 1, 2, 2)
    adversarial = fixed_set(model, size, torch.tensor([0, 1]))
    for method in ("first-order", "ascent"):
        with pytest.raises(ModelError, match="not finite"):
            sensitivities(model, adversarial, method=method)


def test_a_group_without_layers_of_its_own_has_the_mrs_of_what_reads_it() -> None:
    group = ChannelGroup("", 4, 1, 1, ("",), ("a",))
    assert group_sensitivity(group, {"a": 1.0, "far away": 9.0}).mrs == 1.0


def test_structural_mrs_says_how_many_images_it_took() -> None:
    model = tiny_resnet()
    graph = ModelGraph(model, (3, 32, 32), probe=False)
    images = torch.rand(curves.MOST_IMAGES + 1, 3, 32, 32)
    adversarial = fixed_set(model, images, torch.zeros(len(images), dtype=torch.long))
    assert measure_mrs(graph, adversarial, "structural").n == curves.MOST_IMAGES


def test_first_order_and_ascent_agree_for_a_small_radius(
    images: torch.Tensor, labels: torch.Tensor
) -> None:
    model = tiny_resnet().double()
    adversarial = fixed_set(model, images.double(), labels)
    _, linear = first_order(model, adversarial, rho=1e-4)
    _, climbed = ascent(model, adversarial, rho=1e-4, epochs=8)
    assert linear.keys() == climbed.keys()
    for name, value in linear.items():
        assert climbed[name] == pytest.approx(value, rel=0.05), name


def test_sensitivities_leave_the_model_as_it_was(
    images: torch.Tensor, labels: torch.Tensor, threat: ThreatModel
) -> None:
    model = tiny_resnet().train()
    model.net.conv1[0].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adversarial = adversarial_set(model, images, labels, threat=threat, steps=2)
    for method in ("first-order", "ascent"):
        sensitivities(model, adversarial, method=method, epochs=1)
    assert model.training
    assert not model.net.conv1[0].weight.requires_grad
    assert model.net.fc.weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_ascent_puts_weights_back_when_it_fails(
    images: torch.Tensor, labels: torch.Tensor
) -> None:
    model = tiny_resnet()
    before = model.net.conv1[0].weight.clone()
    calls = []

    def fail(module: torch.nn.Module, args: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("in the middle")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        ascent(model, fixed_set(model, images, labels), rho=0.5, epochs=3)
    assert torch.equal(model.net.conv1[0].weight, before)
    assert all(p.requires_grad for p in model.parameters())


def test_a_group_takes_the_largest_value_of_its_members(
    images: torch.Tensor, labels: torch.Tensor
) -> None:
    model = tiny_resnet()
    graph = ModelGraph(model, (3, 32, 32))
    result = sensitivities(model, fixed_set(model, images, labels), groups=graph.groups)
    by_layer = {m.name: m.mrs for m in result.modules}
    assert len(result.groups) == len(graph.groups)
    for group, measured in zip(graph.groups, result.groups, strict=True):
        values = [by_layer[name] for name in group.members if name in by_layer]
        assert measured.mrs == max(values)
        assert by_layer[measured.decided_by] == measured.mrs
    stage = next(g for g in result.groups if g.name == "layer2.0.conv2")
    others = [by_layer[n] for n in ("layer2.0.conv2", "layer2.0.downsample.0")]
    assert stage.mrs == max(others)


def test_nan_weights_are_an_error(images: torch.Tensor, labels: torch.Tensor) -> None:
    model = tiny_resnet()
    with torch.no_grad():
        model.net.conv1[0].weight[0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        sensitivities(model, fixed_set(model, images, labels))


def test_first_order_costs_at_most_three_forward_backward_passes() -> None:
    model = tiny_resnet(channels=[32, 64, 128, 128], stem_width=16)
    images, labels = torch.rand(128, 3, 32, 32), torch.randint(0, 10, (128,))
    adversarial = AdversarialSet(images, labels, ThreatModel.linf(0.03), "given", 0, 64)

    def plain() -> None:
        for part, target in adversarial.batches():
            F.cross_entropy(model(part), target).backward()

    def best_of(function: object, n: int = 3) -> float:
        times = []
        for _ in range(n):
            start = time.perf_counter()
            function()  # type: ignore[operator]
            times.append(time.perf_counter() - start)
        return min(times)

    plain()
    assert best_of(lambda: sensitivities(model, adversarial)) <= 3 * best_of(plain)


def test_a_weight_that_two_layers_share_counts_once_in_every_batch() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)
    )
    net[3].weight = net[1].weight
    net = net.double().eval()
    images, labels = torch.rand(20, 3, 2, 2).double(), torch.randint(3, (20,))
    threat = ThreatModel.linf("8/255")
    whole, parts = (
        first_order(net, AdversarialSet(images, labels, threat, "PGD-1", 0, size), rho=0.1)[1]
        for size in (20, 5)
    )
    assert parts == pytest.approx(whole)
    assert whole["1"] == whole["3"] > 0
