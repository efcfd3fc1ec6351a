"""Weights are found by the network's own names, in any nesting; what was not taken is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from robust_prune import load
from robust_prune.errors import ModelError
from robust_prune.models import open_model
from tests.conftest import OwnNet, randomize_
from tests.models.networks import (
    GIVEN,
    IDENTITY,
    KWARGS,
    MEAN,
    MU,
    SIGMA,
    STD,
    network,
    opened,
    same,
    under,
)

NET = network()
STATE = NET.state_dict()
STAGES = {
    (name.replace("layer2.", "layer2._orig_mod.", 1)): tensor for name, tensor in STATE.items()
}
NESTED: dict[str, Any] = {
    "a loss beside the prefix": {"state_dict": under("model.", STATE) | {"loss.w": torch.ones(9)}},
    "an unknown prefix": under("my_backbone_7.", STATE),
    "several prefixes": under("a.b.module._orig_mod.c.", STATE),
    "unknown keys": {"checkpoint": {"generator": {"params": STATE}}, "step": 3},
    "a list": [{"epoch": 1}, STATE],
    "compiled stages": STAGES,
    "parallel stages": {n.replace("layer1.", "layer1.module."): t for n, t in STATE.items()},
    "body and head apart": {
        "body": {n: t for n, t in STATE.items() if not n.startswith("fc.")},
        "fc": {"weight": STATE["fc.weight"], "bias": STATE["fc.bias"]},
    },
    "counts of operations": STATE | {"total_ops": torch.ones(1), "conv1.total_ops": torch.ones(1)},
    "no counts of batches": {n: t for n, t in STATE.items() if "num_batches" not in n},
    "an optimizer first": {
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "net": STATE,
    },
    "a loss in the same level": STATE | {"criterion.weight": torch.ones(10)},
}


@pytest.mark.parametrize("name", list(NESTED))
def test_weights_are_found_in_any_nesting(name: str, tmp_path: Path) -> None:
    model, _ = opened(tmp_path, NESTED[name], **IDENTITY)
    assert same(model, NET)


def test_what_is_not_used_is_said(tmp_path: Path) -> None:
    _, said = opened(tmp_path, NESTED["a loss beside the prefix"], **IDENTITY)
    assert said == ["the file also holds 'state_dict.loss.w', of which nothing is used"]
    _, said = opened(tmp_path, NESTED["an optimizer first"], **IDENTITY)
    assert said == []


@pytest.mark.parametrize(
    "more",
    [
        {"layer1.0.se.weight": torch.ones(8, 8)},
        {"attention_pool.weight": torch.ones(64, 64)},
        {"layer1.1.conv1.weight": torch.ones(8, 8, 3, 3)},
    ],
)
def test_parts_that_the_network_has_not_are_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    for content in (STATE | more, {"state_dict": under("module.", STATE | more)}):
        with pytest.raises(ModelError, match=f"1 unexpected .*{next(iter(more))}"):
            opened(tmp_path, content)


def test_a_lack_is_refused(tmp_path: Path) -> None:
    lacking = {name: tensor for name, tensor in STATE.items() if name != "layer2.0.conv1.weight"}
    with pytest.raises(ModelError, match=r"1 names missing.*missing layer2.0.conv1.weight"):
        opened(tmp_path, {"model": lacking})


AVERAGES = [
    "ema",
    "ema_state_dict",
    "model_state_dict_ema",
    "ema_model",
    "averaged_state_dict",
    "swa_model",
    "modelEMA",
    "polyak_weights",
]


@pytest.mark.parametrize("key", AVERAGES)
def test_the_average_of_two_sets_is_taken_under_any_name(key: str, tmp_path: Path) -> None:
    average = network(1)
    for content in (
        {"model": STATE, key: average.state_dict()},
        {key: {"decay": 0.999, "shadow": average.state_dict()}, "model": STATE},
        {"state_dict": under("net.", STATE) | under(f"{key}.module.", average.state_dict())},
    ):
        model, said = opened(tmp_path, content, **IDENTITY)
        assert same(model, average)
        assert "two sets of weights; the moving average" in said[-1]
        assert key in said[-1]


def test_without_a_name_the_first_set_is_taken_and_the_others_are_named(tmp_path: Path) -> None:
    sets = {"last": STATE, "best": network(1).state_dict(), "third": network(2).state_dict()}
    model, said = opened(tmp_path, sets, **IDENTITY)
    assert same(model, NET)
    assert "three sets" in said[-1]
    assert "'last' is taken, and 'best' and 'third' are not" in said[-1]


def test_a_teacher_that_is_an_average_is_taken_and_one_that_taught_is_not(tmp_path: Path) -> None:
    slow = {n: t + 0.01 if t.is_floating_point() else t for n, t in STATE.items()}
    model, said = opened(tmp_path, {"student": STATE, "teacher": slow}, **IDENTITY)
    assert not same(model, NET)
    assert "the moving average (cosine" in said[-1]
    model, said = opened(tmp_path, {"teacher": network(1).state_dict(), "student": STATE})
    assert "learned from the others, 'student' is taken" in said[-1]


def test_copies_are_no_second_set(tmp_path: Path) -> None:
    _, said = opened(tmp_path, under("a.", STATE) | under("b.", STATE), **IDENTITY)
    assert said == []


NORMALISED: dict[str, Any] = {
    "mu, sigma": STATE | {"mu": MU, "sigma": SIGMA},
    "a first layer": {"0.mean": MU, "0.std": SIGMA, **under("1.", STATE)},
    "a wrapper": {"normalize.mean": MU, "normalize.std": SIGMA, **under("model.", STATE)},
    "flat": {"state_dict": STATE, "norm": {"image_mean": MU.flatten(), "image_std": SIGMA}},
    "in 0..255": {"model": STATE, "pixel_mean": MU.flatten() * 255, "pixel_std": SIGMA * 255},
    "arrays": {"model": STATE, "mean": MU.flatten().numpy(), "std": SIGMA.flatten().numpy()},
    "a list": {"model": STATE, "config": {"data": {"mean": list(MEAN), "std": list(STD)}}},
    "text": {"model": STATE, "hparams": {"mean": "0.5, 0.4, 0.3", "std": "(0.25, 0.24, 0.23)"}},
    "two copies": {
        "model": {
            **under("module.model.", STATE),
            **under("module.attacker.model.", STATE),
            "module.normalizer.new_mean": MU[0],
            "module.normalizer.new_std": SIGMA[0],
            "module.attacker.normalize.new_mean": MU[0],
            "module.attacker.normalize.new_std": SIGMA[0],
        }
    },
}


@pytest.mark.parametrize("name", list(NORMALISED))
def test_the_files_normalisation_is_used_and_said(name: str, tmp_path: Path) -> None:
    model, said = opened(tmp_path, NORMALISED[name])
    assert model.spec.mean == pytest.approx(MEAN, abs=1e-6)
    assert same(model, NET, MEAN, STD)
    assert said[0].startswith("normalisation from the file")
    assert len(said) == 1
    given, _ = opened(tmp_path, NORMALISED[name], mean=(0, 0, 0), std=(1, 1, 1))
    assert same(given, NET)


@pytest.mark.parametrize(
    "content",
    [
        {"model": STATE, "mean": [0.5, 0.4], "std": [0.2, 0.2]},
        {"model": STATE, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.0, 0.2]},
        {"model": STATE, "mean": ["a", "b", "c"], "std": [0.2, 0.2, 0.2]},
        {"model": STATE, "mean": 0.53, "std": 0.02},
        {"model": STATE, "norm": {"mu": MU, "sigma": -SIGMA}},
    ],
)
def test_what_is_no_normalisation_is_not_used(content: Any, tmp_path: Path) -> None:
    model, said = opened(tmp_path, content)
    assert said[0].startswith("normalisation assumed")
    assert model.spec.mean == (0.485, 0.456, 0.406)


def test_an_own_class_takes_the_files_normalisation_unless_it_holds_it(tmp_path: Path) -> None:
    net = randomize_(OwnNet()).eval()
    torch.save(under("net.", net.state_dict()) | {"mu": MU, "sigma": SIGMA}, tmp_path / "a.pt")
    assert load(tmp_path / "a.pt", model=OwnNet()).spec.mean == pytest.approx(MEAN)

    class Normalised(OwnNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mu", torch.zeros(1, 3, 1, 1))
            self.register_buffer("sigma", torch.ones(1, 3, 1, 1))

    own = Normalised()
    torch.save(own.state_dict(), tmp_path / "b.pt")
    assert isinstance(load(tmp_path / "b.pt", model=Normalised()), Normalised)


TORCHVISIONS = ["mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5"]


@pytest.mark.parametrize("name", TORCHVISIONS)
def test_a_torchvision_network_by_its_bare_name_and_any_head(name: str, tmp_path: Path) -> None:
    net = torchvision.models.get_model(name, num_classes=7).eval()
    content = {"arch": name, "state_dict": under("module.", net.state_dict())}
    torch.save(content, tmp_path / "a.pth.tar")
    model, record = open_model(tmp_path / "a.pth.tar", **IDENTITY)
    assert (model.spec.source, model.spec.arch, model.spec.num_classes) == ("torchvision", name, 7)
    assert f"the network is torchvision/{name}" in record["assumed"][0]
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), net(images))


@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "convnext_tiny", "vgg11", "densenet121", "vit_b_16", "swin_t"]
)
def test_the_number_of_classes_is_read_off_any_head(name: str) -> None:
    from robust_prune.models.architecture import infer_kwargs
    from robust_prune.models.builders import state_shapes

    arch = f"torchvision/{name}"
    state, wanted = (state_shapes(arch, kwargs) for kwargs in ({"num_classes": 37}, {}))
    assert infer_kwargs(arch, {}, wanted, state) == {"num_classes": 37}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mobilenetv3_small_050", "mixer_s32_224"])
def test_classes_and_channels_are_read_off_timms_networks(name: str) -> None:
    from robust_prune.models.architecture import infer_kwargs
    from robust_prune.models.builders import state_shapes

    counts = {"num_classes": 37, "in_chans": 1}
    state, wanted = state_shapes(name, counts), state_shapes(name, {})
    assert infer_kwargs(name, {}, wanted, state) == counts


def test_a_head_of_another_name_or_in_a_sequence(tmp_path: Path) -> None:
    body = {name: tensor for name, tensor in STATE.items() if not name.startswith("fc.")}
    weight, bias = STATE["fc.weight"][:4], STATE["fc.bias"][:4]
    for head in ("classifier", "fc.1", "last.linear"):
        state = body | {f"{head}.weight": weight, f"{head}.bias": bias}
        model, said = opened(tmp_path, state, **IDENTITY)
        assert model.spec.num_classes == 4
        assert torch.equal(model.net.fc.weight, weight)
        assert head in said[-1]
    deep = body | under("fc.0.", {"weight": torch.ones(64, 64), "bias": torch.ones(64)})
    with pytest.raises(ModelError, match="check --arch"):
        opened(tmp_path, deep | {"fc.2.weight": weight, "fc.2.bias": bias})


def test_the_arguments_of_timms_trainer_are_read_as_namespace_and_as_dict(tmp_path: Path) -> None:
    import argparse

    entries = {
        "model": "resnet18",
        "model_kwargs": KWARGS,
        "mean": list(MEAN),
        "std": list(STD),
        "img_size": 48,
    }
    for arguments in (argparse.Namespace(**entries), entries, argparse.Namespace(inner=entries)):
        torch.save({"state_dict": STATE, "args": arguments}, tmp_path / "a.pth.tar")
        model = load(tmp_path / "a.pth.tar")
        assert (model.spec.mean, model.spec.std) == (MEAN, STD)
        assert model.spec.input_size == (3, 48, 48)
        assert model.spec.num_classes == 10


def test_an_unknown_name_in_the_file_is_told(tmp_path: Path) -> None:
    torch.save({"arch": "my_net", "state_dict": STATE}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"'arch' is 'my_net', which neither timm nor torchvision"):
        load(tmp_path / "a.pt")
    assert same(load(tmp_path / "a.pt", **GIVEN, **IDENTITY), NET)
