"""Passes channels last: the same values, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robust_prune.modules import channels_last, takes_channels_last
from tests.conftest import tiny_resnet


class Viewing(nn.Module):
    """Takes the layout of its maps for granted."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.convolution(images)
        return maps.view(len(images), -1)


def test_weights_lie_as_before_even_after_an_error() -> None:
    model = tiny_resnet()
    before = {name: (p.stride(), p.detach().clone()) for name, p in model.named_parameters()}
    moved = []

    def fail() -> None:
        with channels_last(model):
            moved.extend(n for n, p in model.named_parameters() if p.stride() != before[n][0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert moved
    for name, parameter in model.named_parameters():
        assert parameter.stride() == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_what_is_written_meanwhile_stays() -> None:
    layer = nn.Conv2d(3, 4, 3).share_memory()
    place = layer.weight.data_ptr()
    with channels_last(layer), torch.no_grad():
        layer.weight.copy_(torch.arange(108.0).view(4, 3, 3, 3))
    assert torch.equal(layer.weight.detach().flatten(), torch.arange(108.0))
    assert layer.weight.data_ptr() == place
    assert layer.weight.is_shared()


def test_only_models_that_stay_the_same_take_it() -> None:
    image = torch.rand(1, 3, 32, 32)
    assert takes_channels_last(tiny_resnet(), image)
    assert not takes_channels_last(Viewing(), image)
    assert not takes_channels_last(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), image)
