"""Quicker stand-ins for attacks: the same logits and gradients, or the model itself."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from robust_prune.adversaries import autoattack, quick
from robust_prune.adversaries.quick import Quick
from robust_prune.types import ThreatModel
from tests.conftest import randomize_


def images(n: int = 6, size: int = 32) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def gradient(model: nn.Module, at: Tensor) -> Tensor:
    at = at.clone().requires_grad_(True)
    return torch.autograd.grad(model(at)[:, 0].sum(), at)[0]


NETWORKS: dict[str, tuple[dict[str, Any], int]] = {
    "resnet10t": ({"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}, 32),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)}, 32),  # nothing to fold
    "vit_tiny_patch16_224": ({"img_size": 32, "depth": 2, "embed_dim": 24}, 32),
    "mobilevit_xxs": ({}, 64),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_stand_in_gives_the_models_logits_and_gradients(name: str) -> None:
    kwargs, size = NETWORKS[name]
    model = randomize_(timm.create_model(name, num_classes=7, **kwargs)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    strides = [parameter.stride() for parameter in model.parameters()]
    stand_in = quick(model, images(size=size))
    assert isinstance(stand_in, Quick)
    at = images(4, size)
    expected, slope = model(at), gradient(model, at)
    with torch.no_grad():
        torch.testing.assert_close(stand_in(at), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(stand_in(at.requires_grad_(True)), expected, rtol=1e-3, atol=1e-4)
    scale = float(slope.abs().max())
    assert float((gradient(stand_in, at.detach()) - slope).abs().max()) <= 1e-3 * scale
    assert strides == [parameter.stride() for parameter in model.parameters()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_passes_with_a_gradient_never_meet_the_other_layout() -> None:
    model = timm.create_model("resnet10t", num_classes=5).eval()
    stand_in = quick(model, images())
    assert isinstance(stand_in, Quick)
    weights = [m.weight for m in stand_in.differentiated.modules() if isinstance(m, nn.Conv2d)]
    assert weights
    assert all(weight.is_contiguous() for weight in weights)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 32 * 32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x + 0.1 * torch.rand_like(x)).flatten(1))


class NeedsItsLayout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 32 * 32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.view(len(x), -1))


@pytest.mark.parametrize("kind", [Noisy, NeedsItsLayout])
def test_a_model_that_a_stand_in_could_change_attacks_as_it_is(kind: type[nn.Module]) -> None:
    model = kind().eval()
    assert quick(model, images()) is model


def test_the_model_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = NeedsItsLayout().eval()
    sample = images(8)
    labels = model(sample).argmax(1)

    class Constant(nn.Module):
        """Always right, so no attack fools it."""

        def forward(self, x: Tensor) -> Tensor:
            logits = torch.zeros(len(x), 5)
            logits[:, 0] = 1
            return logits + 0 * x.flatten(1).sum(1, keepdim=True)

    module = sys.modules["robust_prune.adversaries.autoattack"]  # its door has a function so named
    monkeypatch.setattr(module, "quick", lambda *_: Constant().eval())
    ours = autoattack(
        model, sample, torch.zeros(8, dtype=torch.long), threat=ThreatModel.linf(0.02), seed=0
    )
    assert torch.equal(ours.robust, labels == 0)
    assert not bool((labels == 0).all())
