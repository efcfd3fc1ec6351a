"""Gradients of images channels last, without torch's backward pass in that layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robust_prune.adversaries import quick
from robust_prune.adversaries.input_gradients import ImageGradients, OnlyPlainBackward
from robust_prune.adversaries.quick import Quick
from robust_prune.errors import AttackError
from robust_prune.modules import copied

LAYERS = {
    "3x3": nn.Conv2d(3, 8, 3, padding=1),
    "narrow, strided": nn.Conv2d(3, 8, 3, stride=2, padding=1),
    "wide, strided": nn.Conv2d(16, 32, 3, stride=2, padding=1),
    "wide, strided, uneven": nn.Conv2d(16, 16, (5, 3), stride=(2, 3), padding=(1, 0)),
    "1x1, strided": nn.Conv2d(5, 7, 1, stride=2),
    "no padding": nn.Conv2d(4, 4, 3),
    "uneven": nn.Conv2d(4, 6, (3, 5), padding=(0, 2), bias=False),
}


def gradient(model: nn.Module, at: Tensor) -> tuple[Tensor, Tensor]:
    at = at.clone().requires_grad_(True)
    out = model(at)
    return out.detach(), torch.autograd.grad(out.square().sum(), at)[0]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [8, 9])
def test_gradients_are_those_of_torch(name: str, size: int) -> None:
    layer = LAYERS[name].double().requires_grad_(False)
    images = torch.rand(3, layer.in_channels, size, size, dtype=torch.float64)
    ours = ImageGradients(nn.Sequential(copied(layer), nn.ReLU()))
    with OnlyPlainBackward():
        logits, slope = gradient(ours, images)
    expected, wanted = gradient(nn.Sequential(layer, nn.ReLU()), images)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(slope, wanted)
    assert slope.stride() == images.stride()


def test_torchs_backward_pass_never_meets_channels_last() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=8).requires_grad_(False)
    ours = ImageGradients(nn.Sequential(layer, nn.ReLU()))
    with pytest.raises(AttackError, match="channels last"), OnlyPlainBackward():
        gradient(ours, torch.rand(2, 8, 6, 6))


@pytest.mark.parametrize(("groups", "expected"), [(1, True), (8, False)])
def test_a_stand_in_takes_them_where_all_convolutions_are_known(
    groups: int, expected: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=groups)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    ).eval()
    stand_in = quick(model, torch.rand(4, 3, 16, 16))
    assert isinstance(stand_in, Quick)
    assert isinstance(stand_in.differentiated, ImageGradients) is expected
    images = torch.rand(4, 3, 16, 16)
    for found, wanted in zip(gradient(stand_in, images), gradient(model, images), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
