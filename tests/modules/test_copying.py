"""Copies of modules that keep activations, and one line for what can't be copied."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import robust_prune
from robust_prune.errors import ModelError
from robust_prune.modules import copied, own_, sharing
from tests.conftest import OwnNet


class Attribute(OwnNet):
    def forward(self, images: Tensor) -> Tensor:
        self.last = super().forward(images)
        self.all = [{"logits": self.last}, images]
        return self.last


class Hooked(OwnNet):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        self.hidden.register_forward_hook(lambda m, i, o: self.kept.update(hidden=o))


class Buffered(OwnNet):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", None)

    def forward(self, images: Tensor) -> Tensor:
        self.last = super().forward(images)
        return self.last


def old_weight_norm() -> nn.Module:
    net = OwnNet()
    nn.utils.weight_norm(net.hidden)
    return net


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [Attribute, Hooked, Buffered, old_weight_norm])
def test_activations_that_a_module_keeps_are_copied_without_their_graph(make: type) -> None:
    net = make().eval()
    images = torch.rand(2, 3, 16, 16)
    expected = net(images)
    again = copied(net)
    assert torch.equal(again(images), expected)
    own = {id(parameter) for parameter in net.parameters()}
    assert not own & {id(parameter) for parameter in again.parameters()}
    if make is Attribute:
        assert net.last.requires_grad
        assert copied(net).last.requires_grad is False
        assert copied(net).all[0]["logits"] is not net.last


@pytest.mark.parametrize("make", [Attribute, Hooked, Buffered])
def test_a_model_that_keeps_activations_is_compressed(make: type) -> None:
    torch.manual_seed(0)
    net = make().eval()
    images, labels = torch.rand(32, 3, 16, 16), torch.arange(32) % 5
    net(images[:2])
    result = robust_prune.compress(net, (images, labels), prune_ratio=0.4)
    assert result.plan.pruned.macs <= 0.6 * result.plan.dense.macs
    assert result.model(images[:2]).shape == (2, 5)


def test_what_is_shared_stays_shared() -> None:
    net = OwnNet()
    twin = copied(net, {id(net.first.weight): net.first.weight})
    assert twin.first.weight is net.first.weight
    assert twin.out.weight is not net.out.weight


def test_what_cant_be_copied_is_named_in_one_line() -> None:
    net = OwnNet()
    net.lock = threading.Lock()
    with pytest.raises(ModelError, match=r"the OwnNet can't be copied.*lock") as caught:
        copied(net)
    assert "\n" not in str(caught.value)


def test_a_sharing_copy_has_its_own_storage_once_it_owns_it() -> None:
    model = OwnNet()
    copy_ = sharing(model)
    pairs = list(zip(model.parameters(), copy_.parameters(), strict=True))
    assert all(a is not b and a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert copy_.norm.running_mean.data_ptr() != model.norm.running_mean.data_ptr()
    copy_.requires_grad_(False)
    assert all(p.requires_grad for p in model.parameters())
    own_(copy_, model)
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
