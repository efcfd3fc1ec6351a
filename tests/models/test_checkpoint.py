"""Models in and out: real formats, bit-equal round trips, and files that must not run code."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import pickle
import resource
import signal
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from robust_prune import load, save
from robust_prune.errors import ModelError, UnsafeFileError, UsageError
from robust_prune.graph import ModelGraph, prune_
from robust_prune.models import write
from robust_prune.modules import ImageModel
from tests.conftest import TINY, OwnNet, randomize_, tiny_resnet
from tests.graph.test_graph import random_plan

ARCH = {"arch": "resnet18", "model_kwargs": TINY, "cifar_stem": True}


def same_outputs(one: nn.Module, two: nn.Module, size: int = 32) -> bool:
    images = torch.rand(3, 3, size, size)
    with torch.no_grad():
        return torch.equal(one.eval()(images), two.eval()(images))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_pruned_model_comes_back_bit_equal(
    resnet: ImageModel, tmp_path: Path, suffix: str
) -> None:
    prune_(resnet, random_plan(ModelGraph(resnet, (3, 32, 32)), 0.6))
    path = save(resnet, tmp_path / f"model{suffix}", {"seed": 3})
    again = load(path)
    assert same_outputs(resnet, again)
    assert again.spec == resnet.spec
    assert again.net.layer1[0].conv1.out_channels == resnet.net.layer1[0].conv1.out_channels
    second = random_plan(ModelGraph(again, (3, 32, 32)), 0.3)
    assert prune_(again, second) is again  # a loaded model can be pruned again


@pytest.mark.parametrize(
    "arch", ["resnet50", "vgg16", "vgg16_bn", "resnext50_32x4d", "densenet121"]
)
def test_families_come_back_bit_equal(arch: str, tmp_path: Path) -> None:
    from robust_prune.models import build_model, resolve_spec

    kwargs = {"mlp_ratio": 0.125} if arch.startswith("vgg") else {}
    model = build_model(resolve_spec(arch, {"num_classes": 10, **kwargs}))
    randomize_(model)
    prune_(model, random_plan(ModelGraph(model, (3, 32, 32)), 0.5))
    assert same_outputs(model, load(save(model, tmp_path / "m.safetensors")))


def test_an_own_class_is_stored_by_widths_and_weights(tmp_path: Path) -> None:
    model = randomize_(OwnNet(width=16)).eval()
    prune_(model, random_plan(ModelGraph(model, (3, 16, 16)), 0.5))
    path = save(model, tmp_path / "own.safetensors")
    again = load(path, model=OwnNet(width=16))
    assert isinstance(again, OwnNet)
    assert same_outputs(model, again, size=16)
    assert again.first.out_channels == model.first.out_channels < 16
    with pytest.raises(
        ModelError, match=r"own.safetensors: the file holds a .*OwnNet, a class that"
    ):
        load(path)
    for wrong in (OwnNet, "resnet18"):
        with pytest.raises(UsageError, match="must be a module to fill"):
            load(path, model=wrong)


def state_dict_files(tmp_path: Path, state: dict[str, torch.Tensor]) -> dict[str, Path]:
    """The same weights in every wrapping people use."""
    files = {}
    averaged = {f"module.{k}": v for k, v in state.items()} | {"n_averaged": torch.tensor(2)}
    wrappings = {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state, "optimizer": {"lr": 0.1}},
        "module": OrderedDict((f"module.{k}", v) for k, v in state.items()),
        "lightning": {"state_dict": {f"model.{k}": v for k, v in state.items()}},
        "compiled": {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}},
        "averaged": averaged,
        "averaged, parallel": {"model": {f"module.{k}": v for k, v in averaged.items()}},
    }
    for name, content in wrappings.items():
        files[name] = tmp_path / f"{name}.pth"
        torch.save(content, files[name])
    files["safetensors"] = tmp_path / "plain.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, files["safetensors"])
    return files


def test_plain_state_dicts_in_every_wrapping(resnet: ImageModel, tmp_path: Path) -> None:
    for name, path in state_dict_files(tmp_path, resnet.net.state_dict()).items():
        model = load(path, **ARCH)
        assert same_outputs(resnet, model), name


def test_a_timm_training_checkpoint_with_its_namespace(tmp_path: Path) -> None:
    net = randomize_(timm.create_model("resnet18", num_classes=7, in_chans=1)).eval()
    path = tmp_path / "timm.pth.tar.pt"
    content = {
        "epoch": 2,
        "arch": "resnet18",
        "state_dict": net.state_dict(),
        "args": argparse.Namespace(model="resnet18", lr=0.1),
        "version": 2,
    }
    torch.save(content, path)
    model = load(path, mean=[0.5], std=[0.25])
    images = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), net((images - 0.5) / 0.25))
    assert model.spec.num_classes == 7


def test_a_hugging_face_folder_as_timm_writes_it(tmp_path: Path) -> None:
    net = randomize_(timm.create_model("resnet18", num_classes=10, **TINY)).eval()
    config = {
        "architecture": "resnet18",
        "num_classes": 10,
        "pretrained_cfg": {
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "input_size": [3, 64, 64],
        },
        "model_args": TINY,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(net.state_dict(), tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert model.spec.mean == (0.1, 0.2, 0.3)
    assert model.spec.input_size == (3, 64, 64)
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    with torch.no_grad():
        assert torch.equal(model(images), net((images - mean) / std))


@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema"])
def test_the_moving_average_is_taken_and_it_is_said(tmp_path: Path, average: str) -> None:
    from robust_prune.models import open_model

    last, mean = tiny_resnet(0), tiny_resnet(1)
    wrapper = "state_dict" if average == "state_dict_ema" else "model"
    path = tmp_path / "trained.pt"
    torch.save({wrapper: last.net.state_dict(), average: mean.net.state_dict()}, path)
    model, record = open_model(path, **ARCH)
    assert same_outputs(model, mean)
    assert f"the moving average '{average}' is taken" in record["assumed"][-1]
    for content in ({average: mean.net.state_dict()}, {wrapper: last.net.state_dict()}):
        torch.save(content | {"epoch": 3}, path)
        model, record = open_model(path, **ARCH)
        assert same_outputs(model, mean if average in content else last)
        assert not any("average" in line for line in record["assumed"])


def hugging_face_folder(folder: Path, **config: object) -> Path:
    folder.mkdir()
    net = randomize_(timm.create_model("resnet18", num_classes=10, **TINY))
    safetensors.torch.save_file(net.state_dict(), folder / "model.safetensors")
    config = {"architecture": "resnet18", "model_args": TINY, "pretrained_cfg": {}, **config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model_args": "width=2"}, "'model_args' must map names to values, not be 'width=2'"),
        ({"pretrained_cfg": [1]}, "'pretrained_cfg' must map"),
        ({"num_classes": "ten"}, "'num_classes' must be a number, not 'ten'"),
    ],
)
def test_a_configuration_of_other_kinds_is_refused(
    tmp_path: Path, wrong: dict[str, object], message: str
) -> None:
    folder = hugging_face_folder(tmp_path / "folder", **wrong)
    with pytest.raises(ModelError, match=f"config.json: {message}"):
        load(folder)


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained", "pretrained_cfg_overlay"])
def test_a_files_arguments_open_nothing_else(tmp_path: Path, argument: str) -> None:
    state = tiny_resnet().net.state_dict()
    arguments = {**TINY, argument: str(tmp_path / "other.pth")}
    spec = {"source": "timm", "arch": "resnet18", "kwargs": arguments, "num_classes": 10}
    torch.save({"state_dict": state, "arch": "resnet18", "model_kwargs": arguments}, tmp_path / "a")
    files = (
        hugging_face_folder(tmp_path / "folder", model_args=arguments),
        write(tmp_path / "own.safetensors", state, {"model": spec}),
        tmp_path / "a",
    )
    for path in files:
        with pytest.raises(ModelError, match=f"{path}: its builder argument '{argument}'"):
            load(path)


def test_a_files_network_is_not_fetched_unless_it_is_named(tmp_path: Path) -> None:
    elsewhere = f"local-dir:{hugging_face_folder(tmp_path / 'other')}"
    folder = hugging_face_folder(tmp_path / "folder", architecture=elsewhere)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    spec = {"source": "timm", "arch": elsewhere, "num_classes": 10}
    for path in (folder, write(tmp_path / "own.safetensors", state, {"model": spec})):
        with pytest.raises(ModelError, match=f"its network '{elsewhere}' would be read"):
            load(path)
    assert load(folder, arch="resnet18").spec.num_classes == 10


def test_a_model_from_elsewhere_is_stored_by_what_timm_builds_alone(tmp_path: Path) -> None:
    from robust_prune.models import build_model
    from robust_prune.types import ModelSpec

    folder = hugging_face_folder(tmp_path / "hub")
    spec = ModelSpec(
        "timm", f"local-dir:{folder}", {"cache_dir": str(tmp_path)}, num_classes=10, mean=(0.5,) * 3
    )
    model = build_model(dataclasses.replace(spec, std=(0.25,) * 3), pretrained=True)
    assert model.spec.arch == "resnet18"
    path = save(model, tmp_path / "m.safetensors")
    for file in folder.iterdir():
        file.unlink()
    assert same_outputs(model, load(path))


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["torch", "pickle", "safetensors name", "in state_dict"])
def test_a_malicious_pickle_is_not_executed(tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "executed"
    path = tmp_path / ("bomb.safetensors" if kind == "safetensors name" else "bomb.pt")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    elif kind == "in state_dict":
        torch.save({"state_dict": tiny_resnet().state_dict(), "extra": Bomb(mark)}, path)
    else:
        torch.save(Bomb(mark), path)
    with pytest.raises((UnsafeFileError, ModelError)) as caught:
        load(path)
    assert not mark.exists()
    assert "\n" not in str(caught.value)


def test_a_pickled_module_is_refused_then_trusted(tmp_path: Path) -> None:
    net = randomize_(timm.create_model("resnet18", num_classes=4)).eval()
    path = tmp_path / "whole.pt"
    torch.save(net, path)
    with pytest.raises(UnsafeFileError, match=r"ResNet.*--trust-pickle"):
        load(path)
    model = load(path, trust_pickle=True)
    assert isinstance(model, ImageModel)
    assert model.spec.arch == "resnet18"
    again = load(save(model, tmp_path / "again.safetensors"))
    assert same_outputs(model, again, size=64)


def test_a_pickled_module_of_an_own_class_is_trusted_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "own.pt"
    torch.save(OwnNet(), path)
    assert isinstance(load(path, trust_pickle=True), OwnNet)


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save(tiny_resnet(0), path)
    before = path.read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        save(tiny_resnet(1), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_a_full_disk_is_said_in_one_line(name: str, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(ModelError, match="can't be written"):
            save(tiny_resnet(), tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_saving_does_not_change_the_model(resnet: ImageModel, tmp_path: Path) -> None:
    before = copy.deepcopy(resnet.state_dict())
    save(resnet, tmp_path / "m.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in resnet.state_dict().items())


def test_torchvision_networks(tmp_path: Path) -> None:
    import torchvision

    net = torchvision.models.resnet18(num_classes=3).eval()
    torch.save(net.state_dict(), tmp_path / "tv.pth")
    with pytest.warns(UserWarning, match="normalisation assumed") as told:
        model = load(tmp_path / "tv.pth", arch="torchvision/resnet18")
    assert told[0].filename == __file__  # the caller's line, not ours
    assert model.spec.num_classes == 3
    assert same_outputs(model, load(save(model, tmp_path / "again.safetensors")), size=64)


def test_a_pickled_timm_module_of_unknown_arguments_keeps_its_normalisation(tmp_path: Path) -> None:
    from robust_prune.models import open_model

    net = randomize_(timm.create_model("resnet18", num_classes=4, channels=(8, 16, 16, 16))).eval()
    torch.save(net, tmp_path / "whole.pt")
    model, record = open_model(tmp_path / "whole.pt", trust_pickle=True)
    assert isinstance(model, ImageModel)
    assert model.spec.source == "custom"
    assert model.spec.mean == tuple(net.pretrained_cfg["mean"])
    assert "normalisation" in record["assumed"][0]
    again = load(
        save(model, tmp_path / "again.safetensors"),
        model=timm.create_model("resnet18", num_classes=4, channels=(8, 16, 16, 16)),
    )
    assert same_outputs(model, again, size=64)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_pickled_timm_module_keeps_its_own_normalisation(channels: int, tmp_path: Path) -> None:
    own = {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
    net = timm.create_model(
        "resnet18", num_classes=4, in_chans=channels, pretrained_cfg_overlay=own
    )
    torch.save(randomize_(net).eval(), tmp_path / "whole.pt")
    model = load(tmp_path / "whole.pt", trust_pickle=True)
    assert isinstance(model, ImageModel)
    assert model.spec.source == "timm"
    assert model.spec.mean == pytest.approx(own["mean"] if channels == 3 else [0.4])
    assert model.spec.std == pytest.approx(own["std"] if channels == 3 else [0.2])
    given = load(
        tmp_path / "whole.pt", trust_pickle=True, mean=[0.7] * channels, std=[1.0] * channels
    )
    assert given.spec.mean == (0.7,) * channels


@pytest.mark.parametrize("pickled", [False, True])
def test_an_own_class_gets_the_normalisation_that_is_given(pickled: bool, tmp_path: Path) -> None:
    net = randomize_(OwnNet()).eval()
    path = tmp_path / "own.pt"
    if pickled:
        torch.save(net, path)
    else:
        save(net, path)

    def again(**kwargs: object) -> torch.nn.Module:
        how = {"trust_pickle": True} if pickled else {"model": OwnNet()}
        return load(path, **how, **kwargs)  # type: ignore[arg-type]

    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        found = again(mean=[0.5, 0.4, 0.3], std=[0.5, 1, 2])(images)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.5, 1, 2]))
        assert torch.equal(found, net((images - mean) / std))
    with pytest.raises(UsageError, match="give both"):
        again(mean=[0.5, 0.5, 0.5])
    with pytest.raises(UsageError, match="one value per channel"):
        again(mean=[0.5, 0.5], std=[1.0])
    with pytest.raises(UsageError, match="positive"):
        again(mean=[0.5], std=[0.0])


def test_the_content_decides_and_not_the_suffix(resnet: ImageModel, tmp_path: Path) -> None:
    assert same_outputs(resnet, load(save(resnet, tmp_path / "model.bin")))
    (save(resnet, tmp_path / "a.safetensors")).rename(tmp_path / "b.pt")
    assert same_outputs(resnet, load(tmp_path / "b.pt"))


def test_images_of_other_channels_are_refused(resnet: ImageModel) -> None:
    from robust_prune.errors import DataError

    with pytest.raises(DataError, match="3 channels, not 1"):
        resnet(torch.rand(2, 1, 32, 32))
