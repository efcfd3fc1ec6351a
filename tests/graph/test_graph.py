"""The engine: costs are exact, pruning equals masking, and misuse is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing import assert_close

from robust_prune.allocation import Problem, allocate_evenly, make_plan
from robust_prune.errors import ModelError, PlanError, UsageError
from robust_prune.graph import DependencyGraph, ModelGraph, count_cost, mask_, masking_error, prune_
from robust_prune.modules import fields_of, fit_, set_fields_
from robust_prune.types import Budget, PruningPlan
from tests.conftest import OwnNet, randomize_, tiny_resnet


def random_plan(
    graph: ModelGraph, ratio: float, target: str = "macs", seed: int = 0
) -> PruningPlan:
    """A plan that meets a budget with random channels."""
    problem = Problem(graph.groups, graph.cost, Budget(target, ratio))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    scores = {g.name: torch.rand(g.units, generator=generator).tolist() for g in graph.groups}
    return make_plan(
        problem,
        allocate_evenly(problem),
        scores,
        allocation="uniform",
        score="random",
        seed=seed,
        input_size=graph.input_size,
        unprunable=graph.unprunable,
        ties=graph.ties,
        whole_heads=graph.whole_heads,
    )


def random_widths_plan(graph: ModelGraph, data: st.DataObject) -> PruningPlan:
    """A plan with any widths at all."""
    widths = {
        g.name: data.draw(st.integers(g.min_units, g.units), label=g.name) * g.blocks
        for g in graph.groups
    }
    generator = torch.Generator().manual_seed(0)
    scores = {g.name: torch.rand(g.units, generator=generator).tolist() for g in graph.groups}
    return make_plan(
        Problem(graph.groups, graph.cost, Budget("macs", 0.5)),
        widths,
        scores,
        allocation="uniform",
        score="random",
        seed=0,
        input_size=graph.input_size,
        ties=graph.ties,
        whole_heads=graph.whole_heads,
    )


def assert_pruned_is_masked(model: nn.Module, plan: PruningPlan, images: torch.Tensor) -> None:
    dense = copy.deepcopy(model).double().eval()
    pruned = prune_(copy.deepcopy(dense), plan)
    masked = mask_(copy.deepcopy(dense), plan)
    with torch.no_grad():
        assert_close(pruned(images.double()), masked(images.double()), rtol=1e-9, atol=1e-9)
        assert not torch.equal(masked(images.double()), dense(images.double()))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_plans_prune_as_masking_does_at_exactly_the_predicted_cost(
    data: st.DataObject,
) -> None:
    model = tiny_resnet()
    graph = ModelGraph(model, (3, 32, 32))
    plan = random_widths_plan(graph, data)
    pruned = prune_(copy.deepcopy(model), plan)
    counted = count_cost(pruned, (3, 32, 32))
    assert (counted.macs, counted.params) == (plan.pruned.macs, plan.pruned.params)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    masked = mask_(copy.deepcopy(model), plan)
    with torch.no_grad():
        assert_close(pruned(images), masked(images), rtol=1e-4, atol=1e-5)


SPINE = ("resnet18", "resnet50", "vgg16_bn", "vgg16")
LARGE = [
    pytest.param(arch, 224, marks=() if arch == "resnet18" else pytest.mark.slow) for arch in SPINE
]


@pytest.mark.parametrize(("arch", "size"), [*((arch, 32) for arch in SPINE), *LARGE])
def test_the_families_of_the_spine(arch: str, size: int) -> None:
    kwargs = {"mlp_ratio": 0.125} if arch.startswith("vgg") else {}
    torch.manual_seed(0)
    model = randomize_(timm.create_model(arch, num_classes=10, **kwargs)).eval()
    graph = ModelGraph(model, (3, size, size))
    images = torch.rand(2, 3, size, size)
    for ratio in (0.25, 0.5, 0.75):
        plan = random_plan(graph, ratio)
        assert plan.reached == pytest.approx(ratio, abs=0.01)
    assert_pruned_is_masked(model, plan, images)
    pruned = prune_(model, plan)
    counted = count_cost(pruned, (3, size, size))
    assert counted.macs == plan.pruned.macs
    assert counted.macs / plan.dense.macs == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    "arch",
    [
        "resnext50_32x4d",
        "seresnet50",
        pytest.param("wide_resnet50_2", marks=pytest.mark.slow),
        "resnet26t",
        "densenet121",
    ],
)
def test_relatives_with_groups_gates_and_concatenation(arch: str) -> None:
    torch.manual_seed(0)
    model = randomize_(timm.create_model(arch, num_classes=10)).eval()
    plan = random_plan(ModelGraph(model, (3, 64, 64)), 0.5)
    assert plan.reached == pytest.approx(0.5, abs=0.01)
    assert_pruned_is_masked(model, plan, torch.rand(2, 3, 64, 64))


@pytest.mark.parametrize("target", ["macs", "params", "channels"])
def test_an_own_class_with_a_skip_a_grouped_convolution_and_a_flatten(target: str) -> None:
    torch.manual_seed(0)
    model = randomize_(OwnNet(width=32))
    graph = ModelGraph(model, (3, 16, 16))
    plan = random_plan(graph, 0.5, target)
    assert plan.reached == pytest.approx(0.5, abs=0.05)
    assert_pruned_is_masked(model, plan, torch.rand(2, 3, 16, 16))
    assert [u.name for u in graph.unprunable] == ["out"]


def test_costs_of_a_hand_counted_network() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )
    macs = 8 * 3 * 9 * 100 + 4 * 8 * 100 + 4 * 10
    params = (8 * 3 * 9 + 8) + 16 + 32 + (40 + 10)
    cost = count_cost(model, (3, 10, 10))
    assert (cost.macs, cost.params) == (macs, params)
    graph = ModelGraph(model, (3, 10, 10))
    half = graph.cost({"0": 5, "3": 3})
    assert half.macs == 5 * 3 * 9 * 100 + 3 * 5 * 100 + 3 * 10
    assert half.params == (5 * 3 * 9 + 5) + 10 + 15 + (30 + 10)
    assert half.channels == 8


def test_building_the_graph_leaves_the_model_as_it_was(resnet: nn.Module) -> None:
    resnet.train()
    resnet.net.bn1.eval()
    resnet.requires_grad_(False)
    resnet.net.fc.requires_grad_(True)
    before = {k: v.clone() for k, v in resnet.state_dict().items()}
    ModelGraph(resnet, (3, 32, 32))
    assert resnet.training
    assert not resnet.net.bn1.training
    assert [n for n, p in resnet.named_parameters() if p.requires_grad] == [
        "net.fc.weight",
        "net.fc.bias",
    ]
    assert all(torch.equal(v, before[k]) for k, v in resnet.state_dict().items())


def test_a_frozen_model_is_pruned_all_the_same(resnet: nn.Module) -> None:
    plan = random_plan(ModelGraph(resnet, (3, 32, 32)), 0.5)
    frozen = copy.deepcopy(resnet).requires_grad_(False)
    again = random_plan(ModelGraph(frozen, (3, 32, 32)), 0.5)
    assert again == plan


def test_protected_layers_stay_whole_and_say_so(resnet: nn.Module) -> None:
    graph = ModelGraph(resnet, (3, 32, 32), protect=["layer3.*", "conv1"])
    plan = random_plan(graph, 0.3)
    pruned = prune_(resnet, plan)
    assert pruned.net.conv1[0].out_channels == 4
    assert pruned.net.conv1[6].out_channels == 8
    assert pruned.net.layer3[0].conv1.out_channels == 24
    reasons = {u.name: u.reason for u in plan.unprunable}
    assert reasons["conv1.0"].startswith("protected")
    assert reasons["layer3.0.conv1"].startswith("protected")
    assert reasons["fc"] == "its channels are the model's outputs"


def test_a_misspelt_protected_layer_is_an_error_with_a_hint(resnet: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"layer1\.0\.conv1"):
        ModelGraph(resnet, (3, 32, 32), protect=["layer1.0.convl"])


def test_a_protected_norm_keeps_its_channels(resnet: nn.Module) -> None:
    graph = ModelGraph(resnet, (3, 32, 32), protect=["layer3.0.bn1"])
    plan = random_plan(graph, 0.5)
    pruned = prune_(resnet, plan)
    assert pruned.net.layer3[0].bn1.num_features == 24
    assert pruned.net.layer2[0].bn1.num_features < 16
    assert "layer3.0.conv1" in {u.name for u in plan.unprunable if "protected" in u.reason}


def test_a_pattern_with_layers_protects_what_they_make_and_not_what_its_norms_read() -> None:
    net = timm.create_model("densenet121", num_classes=4, block_config=(2, 2)).eval()
    layer = "features.denseblock1.denselayer2"
    alone = {g.name for g in ModelGraph(net, (3, 32, 32), protect=[f"{layer}.norm1"]).groups}
    whole = {g.name for g in ModelGraph(net, (3, 32, 32), protect=[layer]).groups}
    stem, made = "features.conv0", f"{layer}.conv1"
    assert stem in whole
    assert stem not in alone
    assert made in alone
    assert made not in whole


@pytest.mark.parametrize("option", ["protect", "only"])
def test_a_pattern_that_has_no_channels_is_an_error(resnet: nn.Module, option: str) -> None:
    with pytest.raises(UsageError, match=rf"^{option}: 'layer1.0.act1' .*name a convolution"):
        ModelGraph(resnet, (3, 32, 32), **{option: ["layer1.0.act1"]})


def test_a_plan_of_another_network_is_refused_and_the_model_untouched(resnet: nn.Module) -> None:
    plan = random_plan(ModelGraph(resnet, (3, 32, 32)), 0.5)
    other = tiny_resnet(channels=[8, 16, 24, 40])
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(PlanError, match="expects 32 channels"):
        prune_(other, plan)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with pytest.raises(PlanError, match="already pruned"):
        prune_(prune_(resnet, plan), plan)


def test_a_plan_made_on_one_copy_applies_to_another_bit_for_bit(resnet: nn.Module) -> None:
    first, second = copy.deepcopy(resnet), copy.deepcopy(resnet)
    plan = random_plan(ModelGraph(first, (3, 32, 32)), 0.5)
    one = prune_(first, plan).state_dict()
    two = prune_(second, PruningPlan.from_json(plan.to_json())).state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_images_of_a_wrong_size_are_an_error(resnet: nn.Module) -> None:
    with pytest.raises(ModelError, match="does not take a 1x32x32 image"):
        ModelGraph(resnet, (1, 32, 32))


def test_pruned_models_are_contiguous_even_if_channels_last_came_in() -> None:
    model = tiny_resnet().to(memory_format=torch.channels_last)
    pruned = prune_(model, random_plan(ModelGraph(model, (3, 32, 32)), 0.5))
    for parameter in pruned.parameters():
        assert parameter.stride() == torch.empty(parameter.shape).stride()


class Normed(nn.Module):
    """Linear layers around a LayerNorm, whose indices torch-pruning's own pruner permutes."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 4, stride=4)
        self.norm = nn.LayerNorm(width)
        self.second = nn.Linear(width, 24)
        self.out = nn.Linear(24, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(images).flatten(2).transpose(1, 2))
        return self.out(torch.relu(self.second(x)).mean(1))


@pytest.mark.parametrize("subclass", [False, True])
def test_layer_norm_keeps_its_weights_in_order_at_high_ratios(subclass: bool) -> None:
    class Own(nn.LayerNorm):
        """torch-pruning looks pruners up by the exact class."""

    model = Normed().double()
    if subclass:
        model.norm = Own(192).double()
    nn.init.uniform_(model.norm.weight)
    nn.init.uniform_(model.norm.bias)
    dense = copy.deepcopy(model)
    plan = random_plan(ModelGraph(model, (3, 16, 16)), 0.85)
    keep = list(plan.group("first").keep)
    prune_(model, plan)
    assert len(keep) < 60
    assert torch.equal(model.norm.weight, dense.norm.weight[keep])
    assert torch.equal(model.norm.bias, dense.norm.bias[keep])
    assert model.norm.normalized_shape == (len(keep),)
    assert model(torch.rand(2, 3, 16, 16).double()).shape == (2, 4)


def test_group_norm_loses_the_same_from_every_group() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    )
    graph = ModelGraph(model, (3, 8, 8))
    assert (graph.groups[0].blocks, graph.groups[0].units) == (4, 4)
    plan = random_plan(graph, 0.5)
    assert plan.group("0").keep_width % 4 == 0
    prune_(model, plan)
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 5)


class Filter(nn.Module):
    """Filters channels one by one, by a buffer that files have or not."""

    def __init__(self, saved: bool, counts: bool, alike: bool = True) -> None:
        super().__init__()
        row = torch.tensor([[1.0, 2.0, 1.0]]) / 4
        kernel = row.T @ row
        rows = kernel.expand(12, 1, 3, 3) * (1 if alike else torch.arange(1, 13).view(-1, 1, 1, 1))
        self.register_buffer("kernel", rows.clone(), persistent=saved)
        self.channels = 12 if counts else "as many as come"

    def forward(self, x: Tensor) -> Tensor:
        count = self.channels if isinstance(self.channels, int) else x.shape[1]
        return nn.functional.conv2d(x, self.kernel, stride=2, groups=count)


@pytest.mark.parametrize(
    ("saved", "counts", "alike", "prunable"),
    [
        (True, True, True, True),
        (True, False, False, True),
        (False, True, True, True),
        (False, False, True, False),  # nothing in a file would say how many are left
        (False, True, False, False),  # nor which
    ],
)
def test_fixed_kernels_shorten_where_a_file_says_what_is_left(
    saved: bool, counts: bool, alike: bool, prunable: bool
) -> None:
    torch.manual_seed(0)

    def make() -> nn.Sequential:
        layers = nn.Conv2d(3, 12, 3), Filter(saved, counts, alike), nn.Conv2d(12, 4, 2)
        return nn.Sequential(*layers, nn.Flatten()).eval()

    model = make()
    graph = ModelGraph(model, (3, 8, 8))
    assert [g.name for g in graph.groups] == (["0"] if prunable else [])
    if not prunable:
        reasons = {u.name: u.reason for u in graph.unprunable}
        assert reasons["0"] == "meets a weight that is no parameter in 1"
        return
    plan = random_plan(graph, 0.5)
    pruned = prune_(copy.deepcopy(model), plan)
    images = torch.rand(2, 3, 8, 8)
    assert masking_error(model, pruned, plan, images) < 1e-9
    again = make()
    fit_(again, pruned.state_dict())
    set_fields_(again, fields_of(pruned))
    again.load_state_dict(pruned.state_dict())
    assert torch.equal(again(images), pruned(images))


def test_frozen_layers_stay_frozen(resnet: nn.Module) -> None:
    resnet.net.layer1.requires_grad_(False)
    before = {n for n, p in resnet.named_parameters() if p.requires_grad}
    prune_(resnet, random_plan(ModelGraph(resnet, (3, 32, 32)), 0.5))
    assert {n for n, p in resnet.named_parameters() if p.requires_grad} == before


def test_a_plan_edited_by_hand_is_refused_before_anything_is_cut(resnet: nn.Module) -> None:
    plan = random_plan(ModelGraph(resnet, (3, 32, 32)), 0.5)
    first = plan.groups[0]
    edited = dataclasses.replace(
        plan, groups=(dataclasses.replace(first, keep=first.keep[1:]), *plan.groups[1:])
    )
    before = {k: v.clone() for k, v in resnet.state_dict().items()}
    with pytest.raises(PlanError, match="edited by hand"):
        prune_(resnet, edited)
    assert all(torch.equal(v, before[k]) for k, v in resnet.state_dict().items())


def test_computed_weights_are_refused_with_what_to_do() -> None:
    model = OwnNet()
    nn.utils.parametrizations.weight_norm(model.first)
    with pytest.raises(ModelError, match="remove_parametrizations"):
        ModelGraph(model, (3, 16, 16))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("compute", "advice", "plain"),
    [
        (nn.utils.spectral_norm, "remove_spectral_norm", nn.utils.remove_spectral_norm),
        (nn.utils.weight_norm, "remove_weight_norm", nn.utils.remove_weight_norm),
        (
            lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
            "prune.remove",
            lambda layer: prune.remove(layer, "weight"),
        ),
    ],
)
def test_the_advice_for_a_computed_weight_works_on_it(
    compute: Callable[[nn.Module], object], advice: str, plain: Callable[[nn.Module], object]
) -> None:
    model = OwnNet()
    compute(model.first)
    model(torch.rand(1, 3, 16, 16))
    with pytest.raises(ModelError, match=advice):
        ModelGraph(model, (3, 16, 16))
    plain(model.first)
    assert ModelGraph(model, (3, 16, 16)).groups


def test_a_trial_that_runs_out_of_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr("robust_prune.graph.probing.silence_", full)
    with pytest.raises(RuntimeError, match="allocate memory"):
        ModelGraph(tiny_resnet(), (3, 32, 32))


@pytest.mark.parametrize("arch", ["mobilevit_xxs", "vit_tiny_patch16_224"])
def test_a_large_network_has_the_groups_of_a_small_one(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials in float32, from one copy at a time."""
    torch.manual_seed(0)
    kwargs = {"img_size": 64} if arch.startswith("vit") else {}
    net, size = timm.create_model(arch, num_classes=10, **kwargs).eval(), (3, 64, 64)
    expected = ModelGraph(net, size)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    monkeypatch.setattr("robust_prune.graph.probing.LARGE", 0)
    graph = ModelGraph(net, size)
    assert (graph.groups, graph.ties) == (expected.groups, expected.ties)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


class Standardised(nn.Conv2d):
    """A convolution with a weight that it computes anew."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(images, weight, self.bias)


class Strange(nn.Module):
    """Such a convolution, and a layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.spare = Standardised(3, 8, 1), nn.Linear(2, 2)
        self.last = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(images).relu().mean((2, 3)))


def test_a_layer_that_is_not_understood_is_not_said_to_be_unused() -> None:
    net = Strange()
    graph = ModelGraph(net, (3, 4, 4))
    why = {item.name: item.reason for item in graph.unprunable}
    assert why["first"] == "what it does with its channels can't be followed"
    assert why["spare"] == "the forward pass does not use it"
    found = DependencyGraph().build_dependency(net, torch.rand(1, 3, 4, 4))
    assert found.unprunable == graph.unprunable == graph.dependency.unprunable


class Noisy(nn.Sequential):
    """Draws anew every time, as a smoothed classifier does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x))


def test_a_network_that_draws_at_random_is_told_so() -> None:
    net = Noisy(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()).eval()
    reasons = {item.name: item.reason for item in ModelGraph(net, (3, 8, 8)).unprunable}
    assert "differ from run to run" in reasons["0"]
