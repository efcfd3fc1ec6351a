"""torch-pruning's importances and pruners on this package's graph: true for every architecture."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import robust_prune as rp
from robust_prune.errors import UsageError
from robust_prune.graph import ModelGraph
from robust_prune.graph.roots import Units
from robust_prune.modules import difference
from tests.conftest import TINY, OwnNet, randomize_
from tests.graph.test_tracing import build

IMPORTANCES: dict[str, Any] = {
    "l2": tp.importance.GroupMagnitudeImportance,
    "lamp": tp.importance.LAMPImportance,
    "batch norm": tp.importance.BNScaleImportance,
    "fpgm": tp.importance.FPGMImportance,
    "taylor": tp.importance.GroupTaylorImportance,
    "hessian": tp.importance.GroupHessianImportance,
    "random": tp.importance.RandomImportance,
    "mrs": lambda: None,  # needs the model
}
PRUNERS: dict[str, tuple[type, dict[str, Any]]] = {
    "local": (tp.pruner.BasePruner, {}),
    "global": (tp.pruner.BasePruner, {"global_pruning": True}),
    "isomorphic": (tp.pruner.BasePruner, {"global_pruning": True, "isomorphic": True}),
    "in steps": (tp.pruner.BasePruner, {"iterative_steps": 2, "round_to": 2}),
    "group norm": (tp.pruner.GroupNormPruner, {}),
    "scale": (tp.pruner.BNScalePruner, {"group_lasso": False}),
    "growing": (tp.pruner.GrowingRegPruner, {}),
}
ARCHS = {
    "resnet18": ({**TINY}, 32),
    "densenet121": ({"block_config": (2, 2, 2, 2), "growth_rate": 8}, 64),
    "mobilevit_xxs": ({}, 64),
    "mobilevitv2_050": ({}, 64),
    "vit_tiny_patch16_224": ({"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}, 32),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1), "embed_dim": 24},
        64,
    ),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 64),
}
# every importance, every pruner and every architecture at least once
FAST = {
    (arch, pruner, importance)
    for i, arch in enumerate(ARCHS)
    for pruner, importance in itertools.islice(
        zip(
            itertools.islice(itertools.cycle(PRUNERS), i, None),
            itertools.islice(itertools.cycle(IMPORTANCES), 2 * i, None),
            strict=False,
        ),
        3,
    )
}
TABLE = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in itertools.product(ARCHS, PRUNERS, IMPORTANCES)
    # theirs takes the root of no score where a group has no batch norm
    if case[1:] != ("group norm", "batch norm") or case[0] in ("resnet18", "densenet121")
]


def network(arch: str, **more: Any) -> tuple[nn.Module, Tensor]:
    """A small member of a family with weights that show errors, and a batch for it."""
    kwargs, side = ARCHS[arch]
    torch.manual_seed(0)
    net = timm.create_model(arch, num_classes=10, **{**kwargs, **more}).eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 2, generator=generator)
        elif tensor.ndim == 1 and isinstance(tensor, nn.Parameter):
            tensor.data.normal_(0.5, 0.2, generator=generator)
    return net, torch.rand(4, 3, side, side, generator=generator)


def assert_masked(dense: nn.Module, pruned: nn.Module, graph: Any, images: Tensor) -> None:
    """What is left computes what the dense network does with the same channels silenced."""
    masked = graph.mask_(copy.deepcopy(dense).double())
    found = copy.deepcopy(pruned).double().eval()
    with torch.no_grad():
        assert difference(found(images.double()), masked(images.double())) < 1e-9


def gradients(net: nn.Module, images: Tensor, importance: Any) -> None:
    labels = torch.arange(len(images))
    losses = nn.functional.cross_entropy(net(images), labels, reduction="none")
    if isinstance(importance, tp.importance.GroupHessianImportance):
        importance.zero_grad()
        for loss in losses:
            net.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(net)
    else:
        net.zero_grad()
        losses.mean().backward()


@pytest.mark.parametrize(("arch", "pruner", "importance"), TABLE)
def test_every_pruner_with_every_importance_on_every_architecture(
    arch: str, pruner: str, importance: str
) -> None:
    net, images = network(arch)
    dense = copy.deepcopy(net)
    score = IMPORTANCES[importance]() or rp.MRSImportance(
        net, (images, torch.arange(4)), rule="mrs", n=4, steps=1
    )
    kind, options = PRUNERS[pruner]
    with rp.dependency_graph():
        made = kind(net, images[:1], score, pruning_ratio=0.5, **options)
    norms = {name for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    scored = {g.name for g in made.DG.groups if importance != "batch norm" or norms & {*g.members}}
    before = sum(group.units for group in made.DG.groups if group.name in scored)
    for _ in range(options.get("iterative_steps", 1)):
        gradients(net, images, score)
        if kind is not tp.pruner.BasePruner:
            made.update_regularizer()
            made.regularize(net)
        made.step()
    # units, not parameters: LAMP over all groups takes from the widest, which need not be large
    left = sum(group.units for group in made.DG.groups if group.name in scored)
    assert left < 0.6 * before or not scored
    assert scored or all(map(torch.equal, net.parameters(), dense.parameters()))
    assert_masked(dense, net, made.DG, images)
    net.train()(images).sum().backward()


ALONE = {
    "resnet18": ({**TINY}, 32),
    "vgg11_bn": ({"mlp_ratio": 0.03}, 32),
    "densenet121": ({"block_config": (2, 2, 2, 2), "growth_rate": 8}, 64),
    "regnetx_002": ({}, 64),
    "mobilenetv2_035": ({}, 64),
}


LOCAL_AND_GLOBAL = [
    pytest.param(arch, everywhere, marks=pytest.mark.slow if everywhere and heavy else ())
    for arch, heavy in zip(ALONE, (False, True, False, True, True), strict=True)
    for everywhere in (False, True)
]


@pytest.mark.parametrize(("arch", "everywhere"), LOCAL_AND_GLOBAL)
def test_where_torch_pruning_alone_is_right_groups_scores_and_weights_are_its_own(
    arch: str, everywhere: bool
) -> None:
    kwargs, side = ALONE[arch]
    torch.manual_seed(0)
    dense = randomize_(timm.create_model(arch, num_classes=10, **kwargs)).eval()
    images = torch.rand(4, 3, side, side)
    names = [n for n in IMPORTANCES if n not in ("random", "mrs")]
    if arch == "regnetx_002":
        names.remove("fpgm")  # raises on grouped convolutions in torch-pruning itself
    for name in names:
        found = []
        for ours in (False, True):
            net, importance = copy.deepcopy(dense), IMPORTANCES[name]()
            options = {
                "pruning_ratio": 0.5,
                "global_pruning": everywhere,
                "ignored_layers": [net.get_classifier()],
                "in_channel_groups": {},
                "out_channel_groups": {},
            }
            if ours:
                with rp.dependency_graph():
                    pruner = tp.pruner.BasePruner(net, images, importance, **options)
            else:
                pruner = tp.pruner.BasePruner(net, images, importance, **options)
            gradients(net, images, importance)
            scores = _scores_by_layers(pruner, net, importance)
            pruner.step()
            found.append((scores, net.state_dict()))
        (theirs, alone), (mine, state) = found
        assert theirs.keys() == mine.keys()
        for layers, values in theirs.items():
            torch.testing.assert_close(mine[layers], values, rtol=1e-3, atol=1e-6)
        for key, value in alone.items():
            assert torch.equal(value, state[key]), (name, key)


def _scores_by_layers(pruner: Any, net: nn.Module, importance: Any) -> dict[Any, Tensor]:
    names = {module: name for name, module in net.named_modules()}
    found = {}
    for group in pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers):
        layers = frozenset(
            (names[dep.target.module], dep.handler.__name__)
            for dep, _ in group
            if dep.target.module in names
        )
        found[layers] = importance(group)
    return found


GRAPHED = {arch: network(arch) for arch in ("mobilevit_xxs", "vit_tiny_patch16_224", "densenet121")}


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(GRAPHED)), st.data())
def test_any_channels_cut_one_group_after_another_are_those_that_masking_silences(
    arch: str, data: st.DataObject
) -> None:
    dense, images = GRAPHED[arch]
    net = copy.deepcopy(dense)
    graph = rp.DependencyGraph(probe=False).build_dependency(net, images)
    groups = data.draw(st.permutations([g.name for g in graph.groups]), label="order")
    for name in [*groups[:6], *groups[:3]]:
        root = graph.group_of(name)[0]
        left = graph.get_out_channels(root.dep.target.module)
        if left > 1:
            count = data.draw(st.integers(1, left - 1), label=name)
            some = data.draw(st.permutations(root.idxs), label=name)[:count]
            group = graph.get_pruning_group(root.dep.target.module, root.dep.handler, some)
            assert graph.check_pruning_group(group)
            group.prune()
    assert_masked(dense, net, graph, images)
    replayed = copy.deepcopy(dense)
    again = rp.DependencyGraph(probe=False).build_dependency(replayed, images)
    again.load_pruning_history(graph.pruning_history())
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in replayed.state_dict().items())


def test_items_hold_each_unit_with_indices_that_rise() -> None:
    net, images = network("mobilevit_xxs")
    graph = rp.DependencyGraph(probe=False).build_dependency(net, images)
    by_root = {g[0].dep.target.name: g for g in graph.get_all_groups()}
    heads = next(g for n, g in by_root.items() if "transformer.0.attn.qkv" in n)
    assert isinstance(heads[0].dep.target.module, Units)
    # the root, what proj reads of each of four heads, and queries, keys and values
    assert [len(item.idxs) for item in heads] == [16, 16, 16, 16, 16, 12 * 16]
    assert heads[5].root_idxs == [i % 16 for i in range(12 * 16)]
    for group in by_root.values():
        for item in group:
            assert item.idxs == sorted(item.idxs)
            assert len(item.idxs) == len(item.root_idxs)
            assert set(item.root_idxs) == set(group[0].idxs)


def test_channels_that_take_all_others_along_are_refused_when_they_are_cut() -> None:
    net, images = network("vit_tiny_patch16_224")
    graph = rp.DependencyGraph(probe=False).build_dependency(net, images)
    head = list(range(16))
    group = graph.get_pruning_group(net.blocks[0].attn.proj, tp.prune_linear_in_channels, head)
    assert not graph.check_pruning_group(group)
    with pytest.raises(UsageError, match="whole_heads=True"):
        group.prune()
    assert graph.pruning_history() == []
    assert net(images).shape == (4, 10)


def test_a_layer_that_is_asked_stands_for_the_group() -> None:
    net, images = network("vit_tiny_patch16_224")
    graph = rp.DependencyGraph().build_dependency(net, images)
    proj = net.blocks[0].attn.proj
    group = graph.get_pruning_group(proj, tp.prune_linear_in_channels, [1, 17, 33])
    assert group[0].idxs == [1, 17, 33]  # one dim of each of the three heads
    rows = [i for item in group[1:] for i in item.idxs if item.dep.layer is net.blocks[0].attn.qkv]
    assert sorted(rows) == [1 + 16 * i for i in range(9)]
    group.prune()
    assert (net.blocks[0].attn.head_dim, proj.in_features) == (15, 45)
    assert net(images).shape == (4, 10)
    assert graph.pruning_history() == [["blocks.0.attn.proj", False, [1, 17, 33]]]


def test_pruning_other_channels_of_a_group_writes_one_line_of_history() -> None:
    net, images = network("resnet18")
    graph = rp.DependencyGraph().build_dependency(net, images)
    group = graph.get_pruning_group(net.conv1[0], tp.prune_conv_out_channels, [0])
    assert "prune_out_channels on conv1.0" in str(group)
    assert "(Pruning Root)" in group.details()
    group.prune(idxs=[1, 2])
    assert [line[2] for line in graph.pruning_history()] == [[1, 2]]


def test_what_has_to_stay_is_refused_with_the_reason() -> None:
    net, images = network("resnet18")
    graph = rp.DependencyGraph().build_dependency(net, images)
    assert [item.name for item in graph.unprunable] == ["fc"]
    with pytest.raises(UsageError, match="its channels are the model's outputs"):
        graph.get_pruning_group(net.fc, tp.prune_linear_out_channels, [0])
    with pytest.raises(ValueError, match="not in the dependency graph"):
        graph.get_pruning_group(nn.Linear(2, 2), tp.prune_linear_out_channels, [0])
    classes = rp.DependencyGraph(prune_outputs=True).build_dependency(net, images)
    classes.get_pruning_group(net.fc, tp.prune_linear_out_channels, [0, 9]).prune()
    assert net(images).shape == (4, 8)


def test_no_depthwise_convolution_is_the_root_whose_scores_importances_read() -> None:
    torch.manual_seed(0)
    net, images = timm.create_model("mambaout_femto", depths=(1, 1, 1, 1)), torch.rand(1, 3, 64, 64)
    dense = copy.deepcopy(net)
    with rp.dependency_graph():
        pruner = tp.pruner.BasePruner(
            net, images, tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.5
        )
    pruner.step()
    assert net.stages[0].blocks[0].conv.weight.shape[0] == 24
    assert_masked(dense.eval(), net, pruner.DG, images)


def test_channels_of_a_convolution_with_groups_go_with_their_twins() -> None:
    torch.manual_seed(0)
    net = randomize_(OwnNet(12)).eval()
    dense, images = copy.deepcopy(net), torch.rand(2, 3, 16, 16)
    graph = rp.DependencyGraph().build_dependency(net, images)
    group = graph.get_pruning_group(net.first, tp.prune_conv_out_channels, [1])
    assert group[0].idxs == [1, 4, 7, 10]
    group.prune()
    graph.get_pruning_group(net.grouped, tp.prune_conv_in_channels, [0]).prune()
    # one input to each group now: no depthwise convolution, though its numbers look like one
    assert (net.grouped.in_channels, net.grouped.groups, net.grouped.out_channels) == (4, 4, 12)
    graph.get_pruning_group(net.grouped, tp.prune_conv_out_channels, [2]).prune()
    assert (net.grouped.in_channels, net.grouped.groups, net.grouped.out_channels) == (4, 4, 8)
    assert_masked(dense, net, graph, images)


def test_whole_heads_go_where_the_pruner_is_asked_for_them() -> None:
    net, images = network("vit_tiny_patch16_224")
    dense = copy.deepcopy(net)
    heads = {block.attn.qkv: 3 for block in net.blocks}
    with rp.dependency_graph():
        pruner = tp.pruner.BasePruner(
            net,
            images,
            tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=0.5,  # of all else
            head_pruning_ratio=0.3,
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
        )
    pruner.step()
    assert [block.attn.num_heads for block in net.blocks] == [2, 2]
    assert set(pruner.num_heads.values()) == {2}
    assert_masked(dense, net, pruner.DG, images)


def test_num_heads_that_are_given_change_nothing() -> None:
    net, images = network("vit_tiny_patch16_224")
    dense = copy.deepcopy(net)
    with rp.dependency_graph():
        pruner = tp.pruner.BasePruner(
            net,
            images,
            tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=0.5,
            num_heads={block.attn.qkv: 3 for block in net.blocks},
        )
    pruner.step()
    assert [block.attn.head_dim for block in net.blocks] == [8, 8]
    assert_masked(dense, net, pruner.DG, images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"isomorphic": True}, "needs global_pruning=True"),
        ({"prune_num_heads": True, "head_pruning_ratio": 0.5}, "prune_head_dims=False"),
        (
            {"prune_num_heads": True, "head_pruning_ratio": 0.5, "prune_head_dims": False},
            "needs num_heads",
        ),
    ],
)
def test_options_that_would_prune_something_else_are_refused(
    options: dict[str, Any], message: str
) -> None:
    net, images = network("vit_tiny_patch16_224")
    importance = tp.importance.GroupMagnitudeImportance()
    with rp.dependency_graph(), pytest.raises(UsageError, match=message):
        tp.pruner.BasePruner(net, images, importance, **options)


def test_two_ratios_for_one_group_are_refused() -> None:
    net, images = network("resnet18")
    importance = tp.importance.GroupMagnitudeImportance()
    ratios = {net.layer2[0].conv2: 0.2, net.layer2[0].downsample[0]: 0.4}
    with rp.dependency_graph(), pytest.raises(UsageError, match="lose the same channels"):
        tp.pruner.BasePruner(net, images, importance, pruning_ratio_dict=ratios)


def test_a_ratio_of_its_own_an_ignored_layer_and_interactive_steps() -> None:
    net, images = network("resnet18")
    dense = copy.deepcopy(net)
    importance = tp.importance.GroupMagnitudeImportance()
    with rp.dependency_graph(probe=False):
        pruner = tp.pruner.BasePruner(
            net,
            images,
            importance,
            pruning_ratio=0.5,
            pruning_ratio_dict={net.layer1[0].conv1: 0.25},
            ignored_layers=[net.layer3[0].conv1],
        )
    for group in pruner.step(interactive=True):
        assert len(group) > 1
        group.prune()
    widths = [net.layer1[0].conv1, net.layer2[0].conv1, net.layer3[0].conv1]
    assert [layer.out_channels for layer in widths] == [6, 8, 24]
    assert_masked(dense, net, pruner.DG, images)


def test_nothing_stays_changed_and_a_pruner_of_ones_own_is_served() -> None:
    class Own(tp.pruner.GroupNormPruner):  # type: ignore[misc]
        """A user's."""

    net, images = network("mobilevit_xxs")
    theirs, init = tp.dependency.DependencyGraph, tp.pruner.BasePruner.__init__
    importance = tp.importance.GroupMagnitudeImportance()
    with rp.dependency_graph(probe=False):
        pruner = Own(net, images, importance, pruning_ratio=0.3)
        again = Own(copy.deepcopy(net), images, importance, pruning_ratio=0.3)
    assert isinstance(pruner.DG, rp.DependencyGraph)
    assert pruner.out_channel_groups is not again.out_channel_groups
    pruner.step()
    with pytest.raises(ZeroDivisionError), rp.dependency_graph():
        raise ZeroDivisionError
    assert tp.dependency.DependencyGraph is theirs
    assert tp.pruner.BasePruner.__init__ is init


def test_building_leaves_mode_gradients_and_weights_alone() -> None:
    net, images = network("resnet18")
    net.train()
    net.bn1.eval()
    net.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    rp.DependencyGraph().build_dependency(net, images)
    assert net.training
    assert not net.bn1.training
    assert not any(p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("arch", ["mobilevit_xxs", "vit_tiny_patch16_224"])
def test_what_a_pruner_left_is_saved_and_loaded_bit_for_bit(arch: str, tmp_path: Path) -> None:
    model, size = build(arch)
    bare = copy.deepcopy(model.net)
    images = torch.rand(2, *size)
    for name, net in (("model", model), ("bare", bare)):
        with rp.dependency_graph(probe=False):
            tp.pruner.BasePruner(
                net, images, tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.4
            ).step()
        rp.save(net, tmp_path / f"{name}.safetensors")
    again = rp.load(tmp_path / "model.safetensors")
    kwargs = dict(model.spec.kwargs)
    fitted = rp.load(tmp_path / "bare.safetensors", arch=arch, model_kwargs=kwargs)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
        assert torch.equal(fitted.net(images), bare(images))


class Scaled(nn.Module):
    """A vector of its own along the channels, and their number, which its forward does not use."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.gain = width, nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def test_a_number_that_says_how_long_a_modules_vector_is_follows_it() -> None:
    net = nn.Sequential(nn.Linear(8, 12), Scaled(12), nn.Linear(12, 5)).eval()
    graph = rp.DependencyGraph().build_dependency(net, torch.rand(2, 8))
    graph.get_pruning_group(net[0], tp.prune_linear_out_channels, [0, 7]).prune()
    assert (net[1].width, len(net[1].gain), net[2].in_features) == (10, 10, 10)


def test_a_plan_and_the_graph_cut_alike() -> None:
    model, size = build("mobilevit_xxs")
    by_plan, graph = copy.deepcopy(model), ModelGraph(model, size, probe=False)
    group = graph.group_of(graph.groups[3].name)
    assert group.graph is graph.dependency
    cut = graph.dependency
    cut.get_pruning_group(group[0].dep.target.module, group[0].dep.handler, [0, 2]).prune()
    other = ModelGraph(by_plan, size, probe=False)
    gone = torch.zeros(graph.groups[3].units, dtype=torch.bool)
    gone[[0, 2]] = True
    other.dependency.remaining.remove_({graph.groups[3].name: gone})
    for key, value in by_plan.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
