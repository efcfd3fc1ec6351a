"""Files as libraries write them, written here with the same structure.

Each structure was compared with a file that the library wrote: torch 2.14.1 (state_dict, compile,
DataParallel, AveragedModel, legacy format), pytorch-lightning 2.6.6 (Trainer.save_checkpoint, with
and without WeightAveraging), timm 1.0.31 (CheckpointSaver, save_for_hf), torchvision 0.29.1,
accelerate 1.15.0 (save_model, save_state), safetensors 0.8.0, transformers 5.24.0 (TimmWrapper),
robustness 1.2.1.post2 (AttackerModel in DataParallel, saved by dill). RobustBench
1.1.1's follows its source (normalize_model): its package could not be imported.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from robust_prune import load, save
from robust_prune.models import build_model, open_model, resolve_spec
from tests.models.networks import (
    GIVEN,
    IDENTITY,
    KWARGS,
    MEAN,
    MU,
    SIGMA,
    STD,
    network,
    same,
    under,
)

State = dict[str, Tensor]


def lightning(state: State, other: State) -> Any:
    """The module's state with a loss and a metric in it, and callbacks, loops, hyperparameters."""
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    return {
        "epoch": 1,
        "global_step": 2,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": OrderedDict(under("model.", state) | {"criterion.weight": torch.ones(10)}),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_k_models": {}, "kth_value": None}},
        "optimizer_states": [optimizer],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"arch": "resnet18", "lr": 0.1, "model_kwargs": KWARGS},
    }


def lightning_average(state: State, other: State) -> Any:
    """WeightAveraging puts the average into state_dict and keeps the last weights beside it."""
    return {
        **lightning(state, other),
        "averaging_state": {"n_averaged": torch.tensor(2)},
        "current_model_state": OrderedDict(under("model.", other)),
    }


def timm_trainer(state: State, other: State) -> Any:
    arguments = argparse.Namespace(
        model="resnet18",
        model_kwargs=KWARGS,
        num_classes=None,
        mean=list(MEAN),
        std=list(STD),
        img_size=32,
        input_size=None,
        gp=None,
    )
    return {
        "epoch": 1,
        "arch": "resnet18",
        "state_dict": other,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "version": 2,
        "args": arguments,
        "state_dict_ema": state,
        "metric": 0.5,
    }


def robustness(state: State, other: State) -> Any:
    copies = {
        **under("module.model.", state),
        **under("module.attacker.model.", state),
        "module.normalizer.new_mean": MU[0],
        "module.normalizer.new_std": SIGMA[0],
        "module.attacker.normalize.new_mean": MU[0],
        "module.attacker.normalize.new_std": SIGMA[0],
    }
    scores = {"nat_prec1": np.float64(90.0), "adv_prec1": torch.tensor(51.5)}
    return {"model": copies, "schedule": None, "epoch": 3, "amp": None, **scores}


def averaged(state: State, other: State) -> Any:
    net = network()
    net.load_state_dict(state)
    return AveragedModel(nn.DataParallel(net)).state_dict()


def compiled_stages(state: State, other: State) -> Any:
    return {n.replace("layer1.", "layer1._orig_mod."): tensor for n, tensor in state.items()}


NORMALISE: State = {"normalize.mean": MU, "normalize.std": SIGMA}
FILES: dict[str, tuple[Callable[[State, State], Any], bool, str]] = {
    # structure, whether the file has the normalisation, what is said
    "state_dict": (lambda s, o: s, False, "assumed"),
    "nested": (lambda s, o: {"net": {"weights": s}, "acc": 0.5, "epoch": 3}, False, "assumed"),
    "DataParallel": (lambda s, o: under("module.", s), False, "assumed"),
    "torch.compile": (lambda s, o: under("_orig_mod.", s), False, "assumed"),
    "torch.compile of stages": (compiled_stages, False, "assumed"),
    "torch.compile, DDP": (lambda s, o: under("module._orig_mod.", s), False, "assumed"),
    "AveragedModel": (averaged, False, "assumed"),
    "Lightning": (lightning, False, "'state_dict.criterion.weight'"),
    "Lightning's WeightAveraging": (lightning_average, False, "the moving average"),
    "timm's CheckpointSaver": (timm_trainer, True, "the moving average 'state_dict_ema' is taken"),
    "robustness": (robustness, True, "model.module.normalizer.new_mean"),
    "RobustBench": (lambda s, o: NORMALISE | under("model.", s), True, "normalize.mean"),
    "RobustBench, mu": (lambda s, o: s | {"mu": MU, "sigma": SIGMA}, True, "(mu, sigma)"),
    "Sequential": (lambda s, o: {"0.mean": MU, "0.std": SIGMA, **under("1.", s)}, True, "0.mean"),
}


@pytest.mark.parametrize("name", list(FILES))
def test_a_file_as_the_library_writes_it(name: str, tmp_path: Path) -> None:
    make, has_normalisation, told = FILES[name]
    net = network()
    torch.save(make(net.state_dict(), network(1).state_dict()), tmp_path / "file.pt")
    model, record = open_model(tmp_path / "file.pt", **GIVEN)
    assert any(told in line for line in record["assumed"])
    mean, std = (MEAN, STD) if has_normalisation else (model.spec.mean, model.spec.std)
    assert same(model, net, mean, std)
    assert same(load(save(model, tmp_path / "again.safetensors")), net, mean, std)


@pytest.mark.parametrize("name", ["Lightning", "timm's CheckpointSaver"])
def test_a_file_that_names_its_network_needs_no_more(name: str, tmp_path: Path) -> None:
    net = network()
    torch.save(FILES[name][0](net.state_dict(), network(1).state_dict()), tmp_path / "file.pt")
    assert same(load(tmp_path / "file.pt", **IDENTITY), net)


def test_the_format_of_older_torch(tmp_path: Path) -> None:
    net = network()
    torch.save(net.state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert same(load(tmp_path / "a.pt", **GIVEN, **IDENTITY), net)


def write_shards(folder: Path, state: State) -> None:
    names = list(state)
    places = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        safetensors.torch.save_file({n: state[n] for n in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_folders_of_accelerate(tmp_path: Path) -> None:
    net = network()
    for name in ("one", "bin", "shards"):
        (tmp_path / name).mkdir()
    safetensors.torch.save_file(net.state_dict(), tmp_path / "one" / "model.safetensors")
    torch.save(net.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    write_shards(tmp_path / "shards", net.state_dict())
    for name in ("one", "bin", "shards"):
        assert same(load(tmp_path / name, **GIVEN, **IDENTITY), net)


def test_an_index_names_only_files_beside_it(tmp_path: Path) -> None:
    from robust_prune.errors import ModelError

    (tmp_path / "in").mkdir()
    safetensors.torch.save_file(network().state_dict(), tmp_path / "model.safetensors")
    index = {"weight_map": {"conv1.weight": "../model.safetensors"}}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="is no file beside it"):
        load(tmp_path / "in", **GIVEN)


def test_folders_of_the_hub(tmp_path: Path) -> None:
    """timm's own, and transformers' wrapper of it, which has a prefix."""
    net = network()
    pretrained = {"mean": MEAN, "std": STD, "input_size": [3, 32, 32]}
    config = {"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": pretrained}
    for name, prefix in (("timm", ""), ("transformers", "timm_model.")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"model_args": KWARGS}))
        state = under(prefix, net.state_dict())
        safetensors.torch.save_file(state, folder / "model.safetensors")
        model = load(folder)
        assert same(model, net, MEAN, STD)
        assert model.spec.input_size == (3, 32, 32)


def whole(net: nn.Module) -> dict[str, Any]:
    return {
        "plain": net,
        "DataParallel": nn.DataParallel(net),
        "AveragedModel": AveragedModel(net),
        "beside a loss": {"criterion": nn.CrossEntropyLoss(), "model": net},
        "beside a loss with weights": {"loss": nn.CrossEntropyLoss(torch.ones(4)), "state": [net]},
        "nested": {"epoch": 1, "nets": {"student": nn.DataParallel(nn.DataParallel(net))}},
    }


@pytest.mark.parametrize("name", list(whole(nn.Identity())))
def test_whole_modules_are_found_and_unwrapped(name: str, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    net = timm.create_model("resnet10t", num_classes=4).eval()
    torch.save(whole(net)[name], tmp_path / "a.pt")
    model, record = open_model(tmp_path / "a.pt", trust_pickle=True)
    assert (model.spec.source, model.spec.arch) == ("timm", "resnet10t")
    assert "normalisation from its own timm configuration" in record["assumed"][0]
    assert same(model, net, net.pretrained_cfg["mean"], net.pretrained_cfg["std"])


def test_of_two_whole_modules_the_average_is_taken_and_said(tmp_path: Path) -> None:
    last, average = network(), network(1)
    torch.save({"model": last, "ema": average}, tmp_path / "a.pt")
    model, record = open_model(tmp_path / "a.pt", trust_pickle=True, **IDENTITY)
    assert same(model, average)
    assert "the moving average 'ema' is taken, and 'model' is not" in record["assumed"][-1]


def test_weights_beside_a_pickled_loss_are_taken_once_trusted(tmp_path: Path) -> None:
    net = network()
    torch.save({"state_dict": net.state_dict(), "loss": nn.CrossEntropyLoss()}, tmp_path / "a.pt")
    model = load(tmp_path / "a.pt", trust_pickle=True, **GIVEN, **IDENTITY)
    assert same(model, net)


def test_a_file_of_torchvision(tmp_path: Path) -> None:
    net = build_model(resolve_spec("torchvision/shufflenet_v2_x0_5", {})).net.eval()
    torch.save(net.state_dict(), tmp_path / "a.pth")
    assert same(load(tmp_path / "a.pth", arch="shufflenet_v2_x0_5", **IDENTITY), net)
