"""A pruned model goes into other people's attacks as it is: a module on images in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robust_prune as rp
from tests.conftest import tiny_resnet

EPS, STEPS = 8 / 255, 5
Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def pyautoattack(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    library = pytest.importorskip("pyautoattack")
    attack = library.AutoAttack(model, eps=EPS, version="custom", attacks=["apgd-ce"], seed=0)
    adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=8)
    return adversarial


def torchattacks(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    library = pytest.importorskip("torchattacks")
    return library.PGD(model, eps=EPS, alpha=EPS / 2, steps=STEPS)(images, labels)


def foolbox(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    library = pytest.importorskip("foolbox", exc_type=ImportError)
    wrapped = library.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = library.attacks.LinfPGD(abs_stepsize=EPS / 2, steps=STEPS)
    return attack(wrapped, images, labels, epsilons=EPS)[1]


def adv_lib(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    library = pytest.importorskip("adv_lib.attacks", exc_type=ImportError)
    return library.pgd_linf(model, images, labels, ε=EPS, steps=STEPS, absolute_step_size=EPS / 2)


@pytest.fixture(scope="module")
def pruned() -> nn.Module:
    made = rp.compress(tiny_resnet(), None, allocation="uniform", calibration_images=8)
    return made.model


@pytest.mark.parametrize("attack", [pyautoattack, torchattacks, foolbox, adv_lib])
def test_attacks_of_others_take_a_pruned_model(attack: Attack, pruned: nn.Module) -> None:
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = pruned(images).argmax(1)  # all of them right, before
    state = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    attacked = attack(pruned, images, labels).detach()
    assert float((attacked - images).abs().max()) <= EPS + 1e-6
    assert float(attacked.min()) >= 0
    assert float(attacked.max()) <= 1
    with torch.no_grad():
        before = nn.functional.cross_entropy(pruned(images), labels)
        after = nn.functional.cross_entropy(pruned(attacked), labels)
    assert after > before + 0.1
    assert not pruned.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in pruned.state_dict().items())


def test_onnx_runtime_gives_the_same_verdicts(pruned: nn.Module, tmp_path: Any) -> None:
    runtime = pytest.importorskip("onnxruntime")
    file = rp.export(pruned, tmp_path / "m.onnx", to="onnx", input_size=(3, 32, 32)).path
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    images = torch.rand(9, 3, 32, 32)
    logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.no_grad():
        assert torch.equal(logits.argmax(1), pruned(images).argmax(1))
