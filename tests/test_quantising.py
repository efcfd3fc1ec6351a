"""INT8 files: what they compute, what is told of them, and whose verdicts count under attack."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import robust_prune as rp
from robust_prune import quantising
from robust_prune.adversaries import pgd_verdicts
from robust_prune.errors import ModelError, UsageError
from robust_prune.evaluation import TestImages
from robust_prune.exporting import OnnxModel
from robust_prune.quantising import Quantised, judge
from robust_prune.types import ThreatModel
from tests.cli.test_cli import run  # noqa: F401 - a fixture
from tests.conftest import OwnNet, tiny_resnet
from tests.oracles import Saying

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="extra [export]"
)
FLOAT = bytearray()  # the float file, which takes seconds to make
LINF = ThreatModel("linf", 0.002)  # some images of a random network withstand it


def images_of(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Quantised]:
    model = tiny_resnet(stem_width=8)
    path = tmp_path_factory.mktemp("int8") / "m.onnx"
    with pytest.MonkeyPatch.context() as patch:
        export = quantising.export

        def kept(model: nn.Module, path: Path, **more: Any) -> None:
            export(model, path, **more)
            FLOAT[:] = path.read_bytes()

        patch.setattr(quantising, "export", kept)
        return model, rp.export_int8(model, path, images_of(40), batches=(2,))


def test_the_file_gives_nearly_the_logits_for_any_batch(made: Any) -> None:
    model, done = made
    runtime, images = OnnxModel(done.path), images_of(7, seed=1)
    with torch.no_grad():
        exact = model(images)
    assert runtime(images).shape == exact.shape
    spread = (exact - exact.mean(0)).norm()
    assert (runtime(images) - exact).norm() < 0.2 * spread
    assert not torch.equal(runtime(images), exact), "it is quantised"
    assert list(done.path.parent.iterdir()) == [done.path]


CPU = torch.cpu.get_capabilities()
SATURATES = CPU.get("architecture") == "x86_64" and not (
    CPU.get("avx512_vnni") or CPU.get("avx_vnni")
)
SEVEN_BITS = ", weights in 7 bits"


def test_what_is_told_of_it(made: Any) -> None:
    model, done = made
    images = images_of(40)
    with torch.no_grad():
        exact, found = model(images), OnnxModel(done.path)(images)
    error = (found - exact).norm() / (exact - exact.mean(0)).norm()
    assert done.error == pytest.approx(float(error), rel=1e-3)
    agreed = (found.argmax(1) == exact.argmax(1)).float().mean()
    assert done.agreement == pytest.approx(float(agreed))
    assert (done.images, done.quantised) == (40, "all operators" + SATURATES * SEVEN_BITS)
    assert done.bytes == done.path.stat().st_size < done.float_bytes
    assert set(done.latency_ms[2]) == {"torch", "onnx", "int8"}
    assert all(ms > 0 for ms in done.latency_ms[2].values())


def test_products_alone_are_quantised_where_all_is_too_coarse(
    made: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, done = made
    monkeypatch.setattr(quantising, "CLOSE", 0.0)
    monkeypatch.setattr(quantising, "export", lambda model, path, **more: path.write_bytes(FLOAT))
    kinds: list[Any] = []
    quantise = quantising._quantise

    def note(whole: Path, draft: Path, images: torch.Tensor, ops: Any, reduced: bool) -> None:
        kinds.append((ops, reduced))
        quantise(whole, draft, images, ops, reduced)

    monkeypatch.setattr(quantising, "_quantise", note)
    again = rp.export_int8(model, tmp_path / "m.onnx", images_of(40), batches=())
    products = ("Conv", "Gemm", "MatMul")
    assert kinds == [(None, False), (None, True), (products, False), (products, True)]
    assert again.error <= done.error + 1e-6, "the nearest of them is kept"


@pytest.fixture
def test_images() -> TestImages:
    with torch.no_grad():
        labels = tiny_resnet()(images_of(24)).argmax(1)
    labels[:4] = (labels[:4] + 1) % 10  # some are wrong without an attack
    return TestImages(images_of(24), labels, "test", 0, 10)


def test_a_model_that_judges_itself_has_its_own_accuracy(test_images: TestImages) -> None:
    before, after = judge(tiny_resnet(), tiny_resnet(), test_images, threat=LINF)
    assert [m.attack for m in after.measurements] == ["clean", "pgd"]
    for m, own in zip(before.measurements, after.measurements, strict=True):
        assert m.correct == own.correct
    assert 0 < sum(before.measurements[1].correct) < 20


def test_the_verdicts_are_the_judges(test_images: TestImages) -> None:
    images, labels = test_images.images, test_images.labels
    options: dict[str, Any] = {"threat": LINF, "steps": 3, "seed": 0}
    model = tiny_resnet()
    plain = pgd_verdicts(model, images, labels, **options)
    same = pgd_verdicts(model, images, labels, judge=model, **options)
    assert torch.equal(plain[0], same[0])
    wrong = Saying((labels + 1) % 10)
    assert not pgd_verdicts(model, images, labels, judge=wrong, **options)[0].any()
    right = Saying(labels)
    assert pgd_verdicts(model, images, labels, judge=right, **options)[0].all()


def test_autoattack_transfers_and_square_attacks_what_is_left(
    test_images: TestImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, Any]] = []

    def attack(model: nn.Module, images: Any, labels: Any, **more: Any) -> Any:
        calls.append((len(images), more.get("attacks")))
        robust = torch.ones(len(images), dtype=torch.bool)
        if more.get("attacks"):
            robust[0] = False  # Square breaks the first that is left
            return SimpleNamespace(robust=robust, images=images, flags=())
        moved = images.clone()
        moved[10:12] = 1 - moved[10:12]  # two images that break the quantised model
        return SimpleNamespace(robust=robust, images=moved, flags=("a flag",))

    monkeypatch.setattr(quantising, "autoattack", attack)
    model = tiny_resnet()
    before, after = judge(model, model, test_images, threat=LINF, attack="autoattack")
    with torch.no_grad():
        moved = test_images.images.clone()
        moved[10:12] = 1 - moved[10:12]
        held = (model(test_images.images).argmax(1) == test_images.labels) & (
            model(moved).argmax(1) == test_images.labels
        )
    own = after.measurements[-1]
    assert sum(own.correct) == int(held.sum()) - 1
    assert own.details["robust_after"] == {"transfer": int(held.sum()), "square": sum(own.correct)}
    assert calls == [(24, None), (int(held.sum()), ("square",))]
    assert before.measurements[-1].flags == ("a flag",)


def test_the_command_measures_what_it_writes(
    made: Any,
    run: Callable[..., tuple[int, str, str]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, done = made
    calibrated: list[torch.Tensor] = []

    def quantised(model: nn.Module, path: Path, images: torch.Tensor) -> Quantised:
        calibrated.append(images)
        path.write_bytes(done.path.read_bytes())
        return dataclasses.replace(done, path=path, images=len(images))

    monkeypatch.setattr(quantising, "export_int8", quantised)
    rp.save(model, "m.safetensors")
    few = ["--data", "digits", "--int8-images", 16, "--n-eval", 8]
    command = ["export", "m.safetensors", "--format", "onnx", "--int8", *few]
    code, out, err = run(*command, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["path"] == "m-int8.onnx"
    assert calibrated[0].shape == (16, 3, 32, 32)
    for which in ("float", "int8"):
        assert [m["attack"] for m in told[which]["measurements"]] == ["clean", "pgd"]
        assert told[which]["n"] == 8
    assert told["int8"]["measurements"][1]["details"]["gradients"] == "of the float model"
    assert "16 training images" in err
    code, _, err = run(*command)
    assert (code, err.count("\n"), "--force" in err) == (2, 1, True)
    code, out, err = run(*command[:5], "--data", "none", "--force", "--int8-images", 4)
    assert (code, "stand-in photographs" in out + err) == (0, True)
    code, _, err = run("export", "m.safetensors", "--format", "hub", "--int8")
    assert (code, err) == (2, "error: --int8 is for --format onnx, not hub\n")


def test_what_can_not_be_quantised_is_one_line_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="images to calibrate on"):
        rp.export_int8(OwnNet(), tmp_path / "m.onnx", images_of(0))
    with pytest.raises(ModelError, match="can't write there"):
        rp.export_int8(OwnNet(), tmp_path / "none" / "m.onnx", images_of(1))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "onnxruntime" else found(n)
    )
    with pytest.raises(UsageError, match=r"package onnxruntime: pip install 'robust-prune\[export"):
        rp.export_int8(OwnNet(), tmp_path / "m.onnx", images_of(1))
    assert not list(tmp_path.iterdir())
