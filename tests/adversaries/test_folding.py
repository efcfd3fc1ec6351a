"""Folded copies: the same logits and gradients as the model, now and after every change of it."""

from __future__ import annotations

import copy
import io
import types
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torchvision.ops import FrozenBatchNorm2d

from robust_prune.adversaries import Folded
from robust_prune.finetune import Attack
from robust_prune.modules import ImageModel
from robust_prune.types import ModelSpec, ThreatModel
from tests.conftest import randomize_, tiny_resnet

NETWORKS = {  # arguments, size, how many batch norms are folded of how many
    "resnet10t": ({"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}, 32, 15, 15),
    "vgg11_bn": ({"mlp_ratio": 0.03}, 32, 8, 8),
    "mobilevit_xxs": ({}, 64, 32, 32),
    "densenet121": ({"block_config": (2, 2), "growth_rate": 8}, 32, 5, 11),
    "efficientnet_lite0": ({}, 32, 49, 49),
    "mobilenetv3_small_050": ({}, 32, 34, 34),
    "tf_mobilenetv3_small_minimal_100": ({}, 32, 29, 34),  # the rest pads by itself: a subclass
}


def images(n: int = 6, size: int = 8, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, size, size, generator=generator, dtype=torch.float64)


def prepared(model: nn.Module) -> nn.Module:
    return randomize_(model).double().eval()


def slope(model: nn.Module, at: Tensor) -> Tensor:
    at = at.detach().requires_grad_(True)
    logits = model(at)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    return torch.autograd.grad((logits * weights).sum(), at)[0]


def assert_same(model: nn.Module, folded: Folded, at: Tensor) -> None:
    """Logits and their gradients with respect to images, model in eval mode."""
    seen = folded.refreshed()
    assert not any(module.training for module in seen.modules())
    torch.testing.assert_close(seen(at), model(at), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(slope(seen, at), slope(model, at), rtol=1e-9, atol=1e-9)


class Net(nn.Module):
    """Convolution, batch norm and a head; `body` says what happens between."""

    def __init__(self, body: Callable[[Net, Tensor], Tensor], **norm: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6, **norm)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.other = nn.BatchNorm2d(6)
        self.gate = nn.Parameter(torch.zeros(1))
        self.head = nn.Linear(6, 4)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, x).mean((2, 3)))


def own_statistics(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    mean, var = net.norm.running_mean, net.norm.running_var
    return F.relu(net.norm(y)) + F.batch_norm(y.detach(), mean, var)


def restless(net: Net, x: Tensor) -> Tensor:
    y = F.relu_(net.conv(x))
    return net.norm(y)


def called_twice(net: Net, x: Tensor) -> Tensor:
    y = F.relu(net.norm(net.again(net.conv(x))))
    return net.other(net.again(y))


NASTY: dict[str, tuple[Callable[[Net, Tensor], Tensor], tuple[str, ...]]] = {
    "plain": (lambda n, x: F.relu(n.norm(n.conv(x))), ("conv",)),
    "two pairs": (lambda n, x: n.other(n.again(F.relu(n.norm(n.conv(x))))), ("conv", "again")),
    "output used twice": (lambda n, x: (y := n.conv(x)) + n.norm(y), ()),
    # what a number cannot show: the other use does nothing for these images
    "output used twice, unseen": (lambda n, x: F.relu((y := n.conv(x)) - 99) + n.norm(y), ()),
    "output used twice behind a zero": (lambda n, x: n.gate * (y := n.conv(x)) + n.norm(y), ()),
    "output changed in place": (restless, ()),
    "read by two norms": (lambda n, x: n.norm(y := n.conv(x)) + n.other(y), ()),
    "convolution called twice": (called_twice, ()),
    "norm called twice": (lambda n, x: n.norm(n.again(F.relu(n.norm(n.conv(x))))), ()),
    "norm called twice, unseen": (
        lambda n, x: n.norm(n.conv(x)) + F.relu(n.norm(x.repeat(1, 2, 1, 1)) - 99),
        (),
    ),
    "norm after an activation": (lambda n, x: n.norm(F.relu(n.conv(x))), ()),
    "norm before the convolution": (lambda n, x: n.conv(x) + n.again(n.norm(n.conv(x))), ()),
    "functional norm": (own_statistics, ()),
    "functional convolution": (
        lambda n, x: n.norm(n.conv(x)) + F.conv2d(x, n.conv.weight, padding=1),
        (),
    ),
    "functional convolution behind a zero": (
        lambda n, x: (
            x[:, :1] + n.gate * (n.norm(n.conv(x)) + F.conv2d(x, n.conv.weight, padding=1))
        ),
        (),
    ),
    "one pair proven of two": (
        lambda n, x: n.other(
            n.again(F.relu(n.norm(n.conv(x)) + F.conv2d(x, n.conv.weight, padding=1)))
        ),
        ("again",),
    ),
    "scale used elsewhere": (lambda n, x: n.norm(n.conv(x)) * n.norm.weight.sum(), ("conv",)),
    "branch that starts at zero": (lambda n, x: x[:, :1] + n.gate * n.norm(n.conv(x)), ("conv",)),
    "one good of two": (
        lambda n, x: n.other(F.relu(y := n.again(F.relu(n.norm(n.conv(x))))) + y),
        ("conv",),
    ),
}


@pytest.mark.parametrize("arch", NETWORKS)
def test_networks_fold_without_changing_logits_and_gradients(arch: str) -> None:
    kwargs, size, pairs, norms = NETWORKS[arch]
    torch.manual_seed(0)
    net = prepared(timm.create_model(arch, num_classes=5, **kwargs))
    found = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(found) == norms
    folded = Folded.of(net, images(size=size))
    assert (0 if folded is None else len(folded.pairs)) == pairs
    if folded is not None:
        assert_same(net, folded, images(size=size, seed=2))


@pytest.mark.parametrize("name", NASTY)
def test_only_a_norm_that_alone_reads_its_convolution_is_folded(name: str) -> None:
    body, layers = NASTY[name]
    net = prepared(Net(body))
    folded = Folded.of(net, images())
    assert tuple(layer for layer, _ in (folded.pairs if folded else ())) == layers
    if folded is not None:
        assert_same(net, folded, images(seed=2))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_fold_with_and_without_bias_and_affine(affine: bool, bias: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, groups=1, padding_mode="reflect", bias=bias),
        nn.BatchNorm2d(4, affine=affine, eps=0.1),
        nn.SiLU(),
        nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding=2, bias=bias),
        nn.BatchNorm2d(8, affine=affine),
        nn.Flatten(),
        nn.Linear(128, 16, bias=bias),
        nn.BatchNorm1d(16, affine=affine),
    )
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    net = net.double().eval()
    folded = Folded.of(net, images())
    assert folded is not None
    assert folded.pairs == (("0", "1"), ("3", "4"), ("6", "7"))
    assert_same(net, folded, images(seed=2))


def plain(net: Net, x: Tensor) -> Tensor:
    return F.relu(net.norm(net.conv(x)))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class Clipped(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-99, 99)


def standardised(net: Net) -> None:
    net.conv = Standardised(3, 6, 3, padding=1).double()


def clipped(net: Net) -> None:
    net.norm = Clipped(6).double().eval()


def patched(net: Net) -> None:
    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1).clamp(-99, 99)

    net.conv.forward = types.MethodType(forward, net.conv)


SPOILED = {
    "hook on the convolution": lambda n: n.conv.register_forward_hook(lambda *a: a[2] * 2),
    "silent hook on the convolution": lambda n: n.conv.register_forward_hook(lambda *a: None),
    "hook on the norm": lambda n: n.norm.register_forward_pre_hook(lambda m, a: (a[0] + 1,)),
    "backward hook": lambda n: n.norm.register_full_backward_hook(lambda *a: None),
    "weight norm": lambda n: parametrizations.weight_norm(n.conv),
    "spectral norm": lambda n: parametrizations.spectral_norm(n.conv),
    "subclass of the convolution": standardised,
    "subclass of the norm": clipped,
    "forward of its own": patched,
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_layer_with_a_will_of_its_own_is_not_folded(name: str) -> None:
    net = prepared(Net(plain))
    SPOILED[name](net)
    assert Folded.of(net, images()) is None


@pytest.mark.parametrize("name", ["silent hook on the convolution", "weight norm"])
def test_a_pair_spoiled_later_ends_the_copy(name: str) -> None:
    net = prepared(Net(plain))
    folded = Folded.of(net, images())
    assert folded is not None
    assert folded.stands_for(net)
    SPOILED[name](net)
    assert not folded.stands_for(net)


def test_frozen_norms_fold_if_they_are_batch_norms_and_stay_otherwise() -> None:
    frozen = prepared(Net(plain))
    frozen.norm.requires_grad_(False)
    folded = Folded.of(frozen.train(), images())
    assert folded is not None
    assert_same(frozen.eval(), folded, images(seed=2))
    frozen.norm = FrozenBatchNorm2d(6).double()
    assert Folded.of(frozen, images()) is None


def test_a_norm_with_statistics_of_the_batch_is_not_folded() -> None:
    net = Net(plain, track_running_stats=False).double().eval()
    assert Folded.of(net, images()) is None


def test_a_linear_layer_on_tokens_is_not_folded() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.layer(x.mean(1))).mean(2)

    assert Folded.of(Tokens().double().eval(), images()) is None


def test_what_cannot_be_copied_is_not_folded() -> None:
    net = prepared(Net(plain))
    net.file = io.BufferedReader(io.BytesIO())
    assert Folded.of(net, images()) is None
    net = prepared(Net(plain))
    weight_norm(net.conv)  # the old one: a weight that is no leaf
    assert Folded.of(net, images()) is None
    assert Folded.of(nn.Flatten(), images()) is None


class Recurrent(nn.Module):
    """A pair that folds, a norm that does not, and weights that a list refers to as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.memory = nn.GRU(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(F.relu(self.norm(self.conv(x))))
        return self.memory(x.mean(3).permute(2, 0, 1))[0][-1]


def trained(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    model(images(size=32)).square().sum().backward()
    optimizer.step()
    model.eval()


def loaded(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})


def assigned(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, assign=True)


def data_replaced(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


@pytest.mark.parametrize("change", [trained, loaded, assigned, data_replaced])
@pytest.mark.parametrize("kind", [tiny_resnet, Recurrent])
def test_refreshed_is_current_after_every_change(
    change: Callable[[nn.Module], None], kind: Callable[[], nn.Module]
) -> None:
    model = prepared(kind())
    folded = Folded.of(model, images(size=32))
    assert folded is not None
    before = folded.refreshed()(images(size=32))
    change(model)
    assert_same(model, folded, images(size=32))
    assert (folded.refreshed()(images(size=32)) - before).abs().max() > 1e-3


def test_values_and_caches_beside_parameters_are_followed() -> None:
    class Cached(nn.Module):
        """As LeViT's: in eval mode the biases are computed once, train mode drops them."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
            self.bias, self.cache = nn.Parameter(torch.ones(6)), {}
            self.factor, self.offset = 1.0, torch.zeros(6)

        def train(self, mode: bool = True) -> Cached:
            self.cache = {} if mode else self.cache
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            bias = self.cache.setdefault("bias", 2 * self.bias.detach())
            return self.norm(self.conv(x)).mean((2, 3)) * self.factor * bias + self.offset

    net = prepared(Cached())
    folded = Folded.of(net, images())
    assert folded is not None
    assert_same(net, folded, images())
    net.factor, net.offset = 3.0, torch.arange(6).double()
    net.bias.data.add_(1)
    net.train()
    net.eval()
    assert_same(net, folded, images())


def test_it_stands_for_its_model_alone_and_as_long_as_its_modules_stay() -> None:
    net = prepared(Net(plain))
    folded = Folded.of(net, images())
    assert folded is not None
    assert folded.stands_for(net)
    assert not folded.stands_for(copy.deepcopy(net))
    net.head = nn.Linear(6, 4).double()
    assert not folded.stands_for(net)


def test_the_model_is_left_as_it_is() -> None:
    model = tiny_resnet()
    model.train()
    model.net.bn1.eval()
    model.net.bn1.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    random_state = torch.get_rng_state()
    folded = Folded.of(model, images(size=32).float())
    assert folded is not None
    logits = folded.refreshed()(images(size=32).float().requires_grad_(True))
    logits.sum().backward()
    assert [module.training for module in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_zero_scale_hides_nothing() -> None:
    class Doubled(nn.Module):
        """A residual branch whose last norm starts at zero, around a layer used twice."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.last = nn.BatchNorm2d(3)
            nn.init.zeros_(self.last.weight)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.conv.weight.sum()  # wrong in a copy whose weights are folded
            return (x + self.last(F.relu(self.norm(self.conv(x))) * weight)).mean((2, 3))

    assert Folded.of(Doubled().double().eval(), images()) is None


def test_image_models_keep_zero_padding_and_contiguous_weights() -> None:
    model = tiny_resnet().double()
    assert isinstance(model, ImageModel)
    folded = Folded.of(model, images(size=32).to(memory_format=torch.channels_last))
    assert folded is not None
    assert_same(model, folded, images(size=32, seed=2))
    assert all(
        p.is_contiguous()
        for m in folded.refreshed().modules()
        for p in m._parameters.values()
        if p is not None
    )
    model.to(memory_format=torch.channels_last)
    for layer, _ in folded.pairs:
        assert folded.refreshed().get_submodule(layer).weight.is_contiguous()


def test_an_attack_through_the_copy_finds_the_same_images() -> None:
    spec = ModelSpec("custom", "Net", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2))
    model = ImageModel(prepared(Net(plain)), spec).double().eval()
    folded = Folded.of(model, images())
    assert folded is not None
    labels = torch.arange(6) % 4
    found = [
        Attack(ThreatModel.linf(0.1), 3, torch.Generator().manual_seed(0), folded=copied)(
            model, images(), labels
        )
        for copied in (None, folded)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
