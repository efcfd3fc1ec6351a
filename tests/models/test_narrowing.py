"""Networks pruned elsewhere: the file's shapes say widths, and the graph what follows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from torch import nn

from robust_prune.errors import ModelError
from robust_prune.graph import ModelGraph
from robust_prune.graph.shapes import units_gone
from robust_prune.models import build_model, resolve_spec
from robust_prune.models.narrowing import narrower
from tests.conftest import randomize_
from tests.graph.test_graph import random_plan
from tests.models.networks import IDENTITY, KWARGS, network, opened, same

STATE = network().state_dict()
VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}


def pruned_by_torch_pruning(net: nn.Module, head: nn.Module) -> nn.Module:
    importance = tp.importance.MagnitudeImportance()
    images = torch.rand(1, 3, 64, 64)
    tp.pruner.BasePruner(
        net, images, importance=importance, pruning_ratio=0.5, ignored_layers=[head]
    ).step()
    return net.eval()


@pytest.mark.parametrize(
    ("arch", "kwargs", "head"),
    [
        ("resnet18", KWARGS, lambda net: net.fc),
        ("torchvision/mobilenet_v2", {}, lambda net: net.classifier[1]),
    ],
)
def test_a_network_pruned_elsewhere_has_the_files_widths(
    arch: str, kwargs: dict[str, Any], head: Callable[[Any], nn.Module], tmp_path: Path
) -> None:
    net = build_model(resolve_spec(arch, {"num_classes": 10, **kwargs})).net
    net = pruned_by_torch_pruning(net, head(net))
    model, said = opened(tmp_path, net.state_dict(), arch=arch, model_kwargs=kwargs, **IDENTITY)
    assert same(model, net)
    assert "pruned elsewhere" in said[0]
    wide = STATE | {"layer1.0.conv1.weight": torch.ones(9, 8, 3, 3)}
    with pytest.raises(ModelError, match=r"other shapes.*check --arch"):
        opened(tmp_path, wide)


@pytest.mark.parametrize(
    ("arch", "kwargs", "heads"),
    [
        ("resnetblur18", KWARGS, False),
        ("vit_tiny_patch16_224", VIT, True),
        ("mobilevit_xxs", {}, True),
        ("convit_tiny", {**VIT, "local_up_to_layer": 1}, False),  # runs with any width
    ],
)
def test_numbers_in_modules_follow_the_files_shapes(
    arch: str, kwargs: dict[str, Any], heads: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = randomize_(timm.create_model(arch, num_classes=10, **kwargs)).eval()
    scales = {m: m.scale for m in net.modules() if isinstance(getattr(m, "scale", None), float)}
    ModelGraph(net, (3, 32, 32)).apply_(random_plan(ModelGraph(net, (3, 32, 32)), 0.5))
    for module, scale in scales.items():
        module.scale = scale  # other tools leave it
    model, said = opened(tmp_path, net.state_dict(), arch=arch, model_kwargs=kwargs, **IDENTITY)
    assert same(model, net)
    assert any("pruned elsewhere" in line for line in said)
    assert any("narrower and as many as before" in line for line in said) == heads


def test_widths_that_a_network_cant_have_are_refused_with_the_way_out(tmp_path: Path) -> None:
    state = STATE | {"layer1.0.conv1.weight": STATE["layer1.0.conv1.weight"][:5]}
    with pytest.raises(ModelError, match=r"pruned elsewhere.*load\(path, model=NETWORK\)"):
        opened(tmp_path, state)


def test_shapes_that_contradict_each_other_say_nothing() -> None:
    graph = ModelGraph(network(), (3, 32, 32))
    shapes = {name: tensor.shape for name, tensor in STATE.items()}
    assert units_gone(graph, shapes) == {group.name: 0 for group in graph.groups}
    fewer = {**shapes, "layer1.0.conv1.weight": torch.Size([5, 8, 3, 3])}
    assert units_gone(graph, fewer) is None


@pytest.mark.parametrize(
    ("own", "theirs", "pruned"),
    [
        ((8, 8, 3, 3), (5, 7, 3, 3), True),
        ((8, 8, 3, 3), (8, 8, 1, 1), False),  # another kernel
        ((8, 8, 3, 3), (9, 8, 3, 3), False),
        ((1, 17, 24), (1, 17, 20), True),  # learned tokens
        ((1, 17, 24), (1, 9, 24), True),  # to be tried: conv1d weights look the same
        ((1, 17, 24), (1, 9, 20), False),  # another number of tokens, too
    ],
)
def test_which_shapes_may_come_of_pruning(
    own: tuple[int, ...], theirs: tuple[int, ...], pruned: bool
) -> None:
    net = nn.Module()
    net.weight = nn.Parameter(torch.ones(own))
    assert narrower(net, {"weight": torch.ones(theirs)}) == (["weight"] if pruned else [])
