"""Pruned models in other programs: ONNX, torch.export, compile, copies and memory formats."""

from __future__ import annotations

import copy
import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

import robust_prune as rp
from robust_prune import exporting
from robust_prune.cli import app
from robust_prune.errors import ModelError, UsageError
from robust_prune.graph import ModelGraph, prune_
from robust_prune.modules import ImageModel, NarrowAttention
from tests.graph.test_graph import random_plan
from tests.graph.test_tracing import build


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("mobilevit_xxs", marks=pytest.mark.slow),
        "mobilevitv2_050",
        "vit_tiny_patch16_224",
    ],
)
def pruned(request: pytest.FixtureRequest) -> tuple[ImageModel, tuple[int, int, int]]:
    model, size = build(request.param)
    prune_(model, random_plan(ModelGraph(model, size), 0.5))
    return model, size


def test_torch_export_takes_any_batch(
    pruned: tuple[ImageModel, tuple[int, int, int]], tmp_path: Path
) -> None:
    model, size = pruned
    done = rp.export(model, tmp_path / "m.pt2", to="torch-export", input_size=size)
    assert done.error is not None
    assert done.error < 1e-5
    program = torch.export.load(tmp_path / "m.pt2").module()
    images = torch.rand(7, *size)
    with torch.no_grad():
        torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.pt2"]


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="extra [export]")
def test_onnx_takes_any_batch(
    pruned: tuple[ImageModel, tuple[int, int, int]], tmp_path: Path
) -> None:
    import onnxruntime

    model, size = pruned
    done = rp.export(model, tmp_path / "m.onnx", to="onnx", input_size=size)
    assert done.error is not None
    assert done.error < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    images = torch.rand(7, *size)
    with torch.no_grad():
        expected = model(images).numpy()
    found = session.run(["logits"], {"images": images.numpy()})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="extra [export]")
def test_onnx_takes_heads_that_are_narrower_than_the_embedding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = VisionTransformer(16, 4, 2, 4, 24, 48, num_classes=5).eval()
    nn.init.normal_(net.heads.head.weight)
    graph = ModelGraph(net, (3, 16, 16), whole_heads=True)
    graph.apply_(random_plan(graph, 0.5))
    assert any(isinstance(module, NarrowAttention) for module in net.modules())
    done = rp.export(net, tmp_path / "m.onnx", to="onnx", input_size=(3, 16, 16))
    assert done.error is not None
    assert done.error < 1e-5


def test_copies_and_memory_formats(pruned: tuple[ImageModel, tuple[int, int, int]]) -> None:
    model, size = pruned
    images = torch.rand(2, *size)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(copy.deepcopy(model)(images), expected)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(images), expected)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_models_give_the_same_logits(
    pruned: tuple[ImageModel, tuple[int, int, int]],
) -> None:
    model, size = pruned
    images = torch.rand(2, *size)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model)(images), model(images), rtol=1e-3, atol=1e-4
        )


class Counting(nn.Module):
    """Its forward depends on values, which no exporter can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.layer(x.flatten(1))
        return logits if float(logits.sum()) > 0 else -logits


def test_what_cant_be_exported_is_one_line_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be exported to torch-export"):
        rp.export(Counting(), tmp_path / "m.pt2", to="torch-export", input_size=(3, 2, 2))
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="onnx, torch-export"):
        rp.export(Counting(), tmp_path / "m", to="tflite", input_size=(3, 2, 2))  # type: ignore[arg-type]


def test_a_file_that_differs_from_the_module_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module, images: torch.Tensor, path: Path) -> object:
        path.write_text("something")
        return lambda x: model(x) + 1

    monkeypatch.setattr(exporting, "_pt2", wrong)
    model, size = build("mobilevit_xxs")
    (tmp_path / "m.pt2").write_text("kept")
    with pytest.raises(ModelError, match="other logits"):
        rp.export(model, tmp_path / "m.pt2", to="torch-export", input_size=size)
    assert (tmp_path / "m.pt2").read_text() == "kept"


def test_missing_packages_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "onnxscript" else found(n)
    )
    with pytest.raises(UsageError, match=r"pip install 'robust-prune\[export\]'"):
        rp.export(nn.Linear(2, 2), tmp_path / "m.onnx", to="onnx", input_size=(1, 1, 2))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    model, size = build("vit_tiny_patch16_224")
    graph = ModelGraph(model, size)
    graph.apply_(random_plan(graph, 0.5))
    monkeypatch.chdir(tmp_path)
    rp.save(model, "small.safetensors")
    command = ["export", "small.safetensors", "--format", "torch-export", "--input-size", "3,64,64"]
    app(command, standalone_mode=False)
    assert Path("small.pt2").exists()
    text = capsys.readouterr().out  # type: ignore[attr-defined]
    assert "checked on batches of 1, 2, 5" in text
    with pytest.raises(UsageError, match="--force"):
        app(command, standalone_mode=False)
    app([*command, "--force"], standalone_mode=False)
