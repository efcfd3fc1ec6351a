"""Files that are no model, or another than is asked for: which they are, and what to do."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from robust_prune import load, save
from robust_prune.errors import ModelError, UsageError
from robust_prune.models import open_model
from robust_prune.untrusted import read_json
from tests.models.networks import GIVEN, IDENTITY, KWARGS, MEAN, STD, network, opened, same

NET = network()
STATE = NET.state_dict()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"weights")
    return buffer.getvalue()


def tarred(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return buffer.getvalue()


def arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.zeros(3))
    return buffer.getvalue()


def halved(write: Callable[[dict[str, torch.Tensor], str], None]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole"
        write(STATE, str(path))
        content = path.read_bytes()
    return content[: len(content) // 2]


FILES: dict[str, tuple[bytes, str]] = {
    "a.pt": (POINTER, "text that begins 'version https://git-lfs"),
    "a.safetensors": (POINTER, "not a safetensors file; it is text that begins 'version"),
    "a.pth": (b"<!DOCTYPE html>\r\n<html>", "text that begins '<!DOCTYPE html>': was the file"),
    "a.npz": (arrays(), "torch.save did not write .it holds 'weight.npy'"),
    "a.zip": (zipped("best.pt"), "torch.save did not write .it holds 'best.pt'.; unpack it"),
    "a.pth.tar": (tarred("best.pt"), "a tar archive; unpack it"),
    "half.pt": (halved(torch.save), "a PyTorch file .a zip archive. that is cut short"),
    "half.safetensors": (halved(safetensors.torch.save_file), "is it cut short"),
    "a.onnx": (b"\x08\x07\x12\x07pytorch", "not a PyTorch or safetensors file$"),
}


@pytest.mark.parametrize("name", list(FILES))
def test_a_file_of_another_kind_is_told_by_what_it_holds(name: str, tmp_path: Path) -> None:
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load(tmp_path / name, **GIVEN)


def test_a_folder_without_weights_of_a_known_name_tells_those_it_has(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    torch.save(STATE, tmp_path / "checkpoints" / "best.ckpt")
    with pytest.raises(ModelError, match=r"it holds best.ckpt: name the file itself"):
        load(tmp_path, **GIVEN)


def old(change: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    def run(layer: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change(layer)

    return run


COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "a mask": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "the old weight norm": old(nn.utils.weight_norm),
    "the old spectral norm": old(nn.utils.spectral_norm),
}


@pytest.mark.parametrize("name", list(COMPUTED))
@pytest.mark.parametrize("prefix", ["", "net.module."])
def test_weights_that_are_computed_are_named(name: str, prefix: str, tmp_path: Path) -> None:
    net = network()
    COMPUTED[name](net.layer1[0].conv1)
    state = {prefix + key: tensor for key, tensor in net.state_dict().items()}
    with pytest.raises(ModelError, match=r"layer1.0.conv1.weight is computed from other tensors"):
        opened(tmp_path, state)


@pytest.mark.parametrize("kind", [torch.int8, torch.complex64, torch.bool])
def test_weights_that_are_no_floating_point_are_refused(kind: torch.dtype, tmp_path: Path) -> None:
    changed = {**STATE, "conv1.weight": STATE["conv1.weight"].to(kind)}
    with pytest.raises(ModelError, match=r"conv1.weight is of .* is the network quantised"):
        opened(tmp_path, changed)


def test_another_network_than_the_file_says_is_refused(tmp_path: Path) -> None:
    model, _ = opened(tmp_path, STATE, **IDENTITY)
    own = save(model, tmp_path / "own.safetensors")
    assert same(load(own, arch="resnet18.a1_in1k"), NET)
    torch.save(timm.create_model("resnet18", num_classes=4), tmp_path / "whole.pt")
    load(tmp_path / "whole.pt", arch="resnet18", trust_pickle=True)
    for path in (own, tmp_path / "whole.pt"):
        with pytest.raises(ModelError, match=r"holds a resnet18, .* and no resnet34"):
            load(path, arch="resnet34", trust_pickle=True)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_a_pickled_module_is_used_in_float32(kind: torch.dtype, tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18", num_classes=4).to(kind), tmp_path / "whole.pt")
    model, record = open_model(tmp_path / "whole.pt", trust_pickle=True)
    assert model(torch.rand(1, 3, 32, 32)).dtype == torch.float32
    assert model.spec.arch == "resnet18"
    assert f"of {str(kind)[6:]}, and are used as float32" in record["assumed"][1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": MEAN}, "give both"),
        ({"std": STD}, "give both"),
        ({"mean": (127.5,) * 3, "std": (60,) * 3}, "divide both by 255"),
    ],
)
def test_half_a_normalisation_or_one_of_bytes_is_refused(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        opened(tmp_path, STATE, **given)


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {"image_mean": MEAN, "image_std": STD},
    "open_clip_config.json": {"preprocess_cfg": {"mean": MEAN, "std": STD}},
    "config.json": {"model_type": "resnet", "image_mean": MEAN, "image_std": STD},
}


@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_the_normalisation_beside_a_folders_weights_is_used(name: str, tmp_path: Path) -> None:
    safetensors.torch.save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / name).write_text(json.dumps(CONFIGURATIONS[name]))
    model, record = open_model(tmp_path, arch="resnet18", model_kwargs=KWARGS)
    assert same(model, NET, MEAN, STD)
    assert name in record["assumed"][0]
    (tmp_path / name).write_text(json.dumps({**CONFIGURATIONS[name], "do_normalize": False}))
    if "preprocess_cfg" not in CONFIGURATIONS[name]:
        _, record = open_model(tmp_path, arch="resnet18", model_kwargs=KWARGS)
        assert "normalisation assumed" in record["assumed"][0]


def test_a_byte_order_mark_before_json_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"architecture": "resnet18"}', encoding="utf-8-sig")
    assert read_json(path) == {"architecture": "resnet18"}
