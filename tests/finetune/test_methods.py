"""Methods of adversarial training: losses and gradients against their definitions, written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.errors import UsageError
from robust_prune.finetune import (
    Attack,
    ard,
    awp,
    bind,
    is_single_step,
    mart,
    n_fgsm,
    needs_teacher,
    pgd_at,
    resolve_method,
    rslad,
    trades,
)
from robust_prune.finetune.methods.mart import _boosted
from robust_prune.modules import float32_logits
from robust_prune.registry import METHODS
from robust_prune.types import ThreatModel
from tests.conftest import randomize_, tiny_resnet

Batch = tuple[Tensor, Tensor]
NAMES = list(METHODS)


def attack(threat: ThreatModel, **settings: object) -> Attack:
    return Attack(threat, 3, torch.Generator().manual_seed(0), **settings)


def teacher_like(model: nn.Module) -> nn.Module:
    """Another network of the same kind, further from its start than the model is."""
    teacher = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in teacher.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.3 * noise)
    return teacher.eval()


def bound(name: str, teacher: nn.Module) -> Callable[..., Tensor]:
    method = resolve_method(name)[1]
    return bind(method, teacher) if needs_teacher(method) else method


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 5)).double()


@pytest.fixture
def norm_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 5),
    )
    return randomize_(net.double()).train()


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 4, 4, generator=generator).double(), torch.arange(6) % 5


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of probabilities [N, K], per image, as it is defined."""
    return (p * (p / q).log()).sum(1)


def expected_pgd_at(net: nn.Module, teacher: nn.Module, batch: Batch, a: Attack) -> Tensor:
    images, labels = batch
    return -net(a(net, images, labels)).log_softmax(1)[torch.arange(6), labels].mean()


def expected_n_fgsm(net: nn.Module, teacher: nn.Module, batch: Batch, a: Attack) -> Tensor:
    images, labels = batch
    threat, size = a.threat, images.shape
    if threat.norm == "linf":
        noise = (
            2 * threat.eps * (2 * torch.rand(size, generator=a.generator, dtype=images.dtype) - 1)
        )
    else:
        direction = torch.randn(size, generator=a.generator, dtype=images.dtype).flatten(1)
        radius = torch.rand(6, 1, generator=a.generator, dtype=images.dtype) ** (1 / 48)
        noise = 2 * threat.eps * (radius * F.normalize(direction)).view(size)
    start = (images + noise).clamp(0, 1).requires_grad_(True)
    (slope,) = torch.autograd.grad(F.cross_entropy(net(start), labels), start)
    step = slope.sign() if threat.norm == "linf" else F.normalize(slope.flatten(1)).view(size)
    return F.cross_entropy(net((start.detach() + threat.eps * step).clamp(0, 1)), labels)


def expected_trades(net: nn.Module, teacher: nn.Module, batch: Batch, a: Attack) -> Tensor:
    images, labels = batch
    still = net(images).softmax(1).detach()
    moved = a(net, images, labels, lambda logits: divergence(still, logits.softmax(1)))
    smoothness = divergence(net(images).softmax(1), net(moved).softmax(1)).mean()
    return F.cross_entropy(net(images), labels) + 6 * smoothness


def expected_mart(net: nn.Module, teacher: nn.Module, batch: Batch, a: Attack) -> Tensor:
    images, labels = batch
    p, q = net(images).softmax(1), net(a(net, images, labels)).softmax(1)
    total = torch.zeros((), dtype=images.dtype)
    for i, y in enumerate(labels.tolist()):
        rival = max(q[i, k] for k in range(5) if k != y)
        pull = sum(p[i, k] * torch.log(p[i, k] / q[i, k]) for k in range(5))
        total = total - torch.log(q[i, y]) - torch.log(1 - rival) + 5 * pull * (1 - p[i, y])
    return total / 6


def expected_rslad(net: nn.Module, teacher: nn.Module, batch: Batch, a: Attack) -> Tensor:
    images, labels = batch
    target = teacher(images).softmax(1).detach()
    moved = a(net, images, labels, lambda logits: divergence(target, logits.softmax(1)))
    adversarial = divergence(target, net(moved).softmax(1)).mean()
    return 5 / 6 * adversarial + 1 / 6 * divergence(target, net(images).softmax(1)).mean()


def expected_ard(net: nn.Module, teacher: nn.Module, batch: Batch, a: Attack) -> Tensor:
    images, labels = batch
    target = (teacher(images) / 30).softmax(1).detach()
    moved = a(net, images, labels)
    return 900 * divergence(target, (net(moved) / 30).softmax(1)).mean()


EXPECTED = {
    "pgd-at": expected_pgd_at,
    "n-fgsm": expected_n_fgsm,
    "trades": expected_trades,
    "mart": expected_mart,
    "rslad": expected_rslad,
    "ard": expected_ard,
}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_those_written_out(
    net: nn.Module, batch: Batch, name: str, norm: str
) -> None:
    threat, teacher = ThreatModel(norm, 0.1 if norm == "linf" else 0.5), teacher_like(net)
    found = bound(name, teacher)(net, *batch, attack(threat))
    expected = EXPECTED[name](net, teacher, batch, attack(threat))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, net), gradient(expected, net))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_differences(net: nn.Module, batch: Batch, name: str) -> None:
    teacher = teacher_like(net)
    moved = attack(ThreatModel.linf(0.1))(net, *batch)

    class Fixed(Attack):
        def __call__(self, *args: object, **keywords: object) -> Tensor:
            return moved

        def single_step(self, *args: object) -> Tensor:
            return moved

    still = Fixed(ThreatModel.linf(0.1), 3, torch.Generator())

    def loss(bias: Tensor) -> Tensor:
        class Shifted(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return net(images) + bias

        return bound(name, teacher)(Shifted(), *batch, still)

    assert torch.autograd.gradcheck(loss, torch.zeros(5, dtype=torch.double, requires_grad=True))


def test_ard_mixes_in_the_cross_entropy_on_clean_images(net: nn.Module, batch: Batch) -> None:
    images, labels = batch
    teacher, threat = teacher_like(net), ThreatModel.linf(0.1)
    found = ard(net, images, labels, attack(threat), teacher=teacher, alpha=0.25, temperature=2.0)
    moved = attack(threat)(net, images, labels)
    pull = divergence((teacher(images) / 2).softmax(1).detach(), (net(moved) / 2).softmax(1))
    expected = 0.25 * 4 * pull.mean() + 0.75 * F.cross_entropy(net(images), labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, net), gradient(expected, net))


def test_the_boosted_cross_entropy_stays_finite_where_its_formula_does_not() -> None:
    logits = torch.tensor([[0.0, 200.0, 0.0], [200.0, 0.0, 0.0]], requires_grad=True)
    found = _boosted(logits.log_softmax(1), torch.tensor([0, 0]))
    # wrong by 200: -log p_y = 200, log(1 - p_rival) = log(2) - 200; right by 200: both are 0
    torch.testing.assert_close(found, torch.tensor([400 - math.log(2), 0.0]))
    (slope,) = torch.autograd.grad(found.sum(), logits)
    # the rival's share in both terms, and the two others' in the second
    torch.testing.assert_close(slope, torch.tensor([[-1.5, 2.0, -0.5], [0.0, 0.0, 0.0]]))


def test_mart_of_two_classes_doubles_the_cross_entropy(batch: Batch) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).double()
    images, labels = batch[0], batch[1] % 2
    found = mart(net, images, labels, attack(ThreatModel.linf(0.1)), weight=0.0)
    moved = attack(ThreatModel.linf(0.1))(net, images, labels)
    torch.testing.assert_close(found, 2 * F.cross_entropy(net(moved), labels))


@pytest.mark.parametrize("method", [pgd_at, n_fgsm, trades])
def test_label_smoothing_is_that_of_the_cross_entropy(
    net: nn.Module, batch: Batch, method: Callable[..., Tensor]
) -> None:
    images, labels = batch
    threat = ThreatModel.linf(0.1)
    plain = method(net, images, labels, attack(threat))
    smooth = method(net, images, labels, attack(threat, label_smoothing=0.2))
    where = {pgd_at: attack(threat).__call__, n_fgsm: attack(threat).single_step}.get(method)
    log_probabilities = net(where(net, images, labels) if where else images).log_softmax(1)
    chosen = log_probabilities[torch.arange(6), labels]
    change = 0.2 * (chosen - log_probabilities.mean(1)).mean()
    torch.testing.assert_close(smooth - plain, change)


def test_ard_smooths_its_cross_entropy(net: nn.Module, batch: Batch) -> None:
    smooth = attack(ThreatModel.linf(0.1), label_smoothing=0.2)
    found = ard(net, *batch, smooth, teacher=net, alpha=0.0)
    torch.testing.assert_close(found, F.cross_entropy(net(batch[0]), batch[1], label_smoothing=0.2))


@pytest.mark.parametrize("name", [*NAMES, "trades+awp", "n-fgsm+awp", "rslad+awp"])
def test_attacks_see_eval_mode_and_the_loss_train_mode(name: str, threat: ThreatModel) -> None:
    model = tiny_resnet().train()
    model.net.layer1.eval()  # frozen by its owner, and left so
    method = bound(name, tiny_resnet(1))
    seen = []
    model.net.bn1.register_forward_hook(lambda m, i, o: seen.append(m.training))
    method(model, torch.rand(4, 3, 32, 32), torch.arange(4), attack(threat))
    assert seen[-1]
    assert not all(seen)
    assert model.training
    assert model.net.bn1.training
    assert not model.net.layer1.training


@pytest.mark.parametrize("name", [*NAMES, "pgd-at+awp"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_batch_norms_in_attacks(norm_net: nn.Module, batch: Batch, name: str, mode: str) -> None:
    """The attack's forward passes normalise by what `batchnorm` says, and write no statistics."""
    norm: nn.BatchNorm2d = norm_net[1]
    images, labels = batch
    written, wrong = [], []

    def watch(module: nn.BatchNorm2d, args: tuple[Tensor], output: Tensor) -> None:
        (given,) = args
        batched = F.batch_norm(given, None, None, module.weight, module.bias, training=True)
        in_loss = module.training and module.track_running_stats
        if in_loss:
            written.append(1)
        elif torch.allclose(output, batched) != (mode == "train"):
            wrong.append(1)

    method = bound(name, teacher_like(norm_net))
    norm.register_forward_hook(watch)
    before = norm.num_batches_tracked.clone()
    method(norm_net, images, labels, attack(ThreatModel.linf(0.1), batchnorm=mode))
    assert not wrong
    passes = 2 if name in ("trades", "mart", "rslad") else 1
    assert norm.num_batches_tracked - before == passes
    assert len(written) == (2 * passes if name.endswith("+awp") else passes)
    assert norm.track_running_stats


def test_running_statistics_are_those_of_the_losses_passes(
    norm_net: nn.Module, batch: Batch
) -> None:
    mirror = copy.deepcopy(norm_net)
    pgd_at(norm_net, *batch, attack(ThreatModel.linf(0.1), batchnorm="train"))
    moved = attack(ThreatModel.linf(0.1), batchnorm="train")(mirror, *batch)
    mirror(moved)
    torch.testing.assert_close(norm_net[1].running_mean, mirror[1].running_mean)
    torch.testing.assert_close(norm_net[1].running_var, mirror[1].running_var)


@pytest.mark.parametrize("method", [rslad, ard, awp(rslad), awp(ard)])
@pytest.mark.parametrize("training", [False, True])
def test_the_teacher_is_seen_in_eval_mode_and_learns_nothing(
    norm_net: nn.Module, batch: Batch, method: Callable[..., Tensor], training: bool
) -> None:
    teacher = teacher_like(norm_net).train(training)
    state = copy.deepcopy(teacher.state_dict())
    modes = []
    teacher[1].register_forward_hook(lambda m, i, o: modes.append(m.training))
    method(norm_net, *batch, attack(ThreatModel.linf(0.1)), teacher=teacher).backward()
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in norm_net.parameters())
    assert modes
    assert not any(modes)
    assert teacher.training == training
    assert all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())


def test_a_model_that_teaches_itself_has_nothing_to_learn_on_clean_images(
    net: nn.Module, batch: Batch
) -> None:
    found = rslad(net, *batch, attack(ThreatModel.linf(0.1)), teacher=net, adversarial_share=0.0)
    torch.testing.assert_close(found, torch.zeros_like(found))


def written_out_awp(
    method: Callable[..., Tensor], model: nn.Module, batch: Batch, a: Attack, gamma: float
) -> tuple[Tensor, Tensor]:
    """AWP as a program that changes weights: loss and gradient, of a method on fixed images.

    The images are found on a copy; statistics of batch norms are put back by hand.
    """
    moved = []

    class Kept(Attack):
        def __call__(self, *args: object, **keywords: object) -> Tensor:
            if len(moved) == 0:
                moved.append(super().__call__(*args, **keywords))  # type: ignore[arg-type]
            return moved[0]

        def single_step(self, *args: object) -> Tensor:
            if len(moved) == 0:
                moved.append(super().single_step(*args))  # type: ignore[arg-type]
            return moved[0]

    kept = Kept(a.threat, a.steps, a.generator)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    first = method(model, *batch, kept)
    slopes = torch.autograd.grad(first, list(model.parameters()))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for weight, slope in zip(model.parameters(), slopes, strict=True):
            if weight.ndim > 1:
                weight += gamma * weight.norm() * slope / slope.norm()
    loss = method(model, *batch, kept)
    return loss, gradient(loss, model)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", NAMES)
def test_awp_is_the_loss_and_gradient_at_changed_weights(
    norm_net: nn.Module, batch: Batch, name: str, norm: str
) -> None:
    threat = ThreatModel(norm, 0.1 if norm == "linf" else 0.5)
    method = bound(name, teacher_like(norm_net))
    mirror = copy.deepcopy(norm_net)
    expected, slopes = written_out_awp(method, mirror, batch, attack(threat), gamma=0.05)
    plain = method(copy.deepcopy(norm_net), *batch, attack(threat))
    found = awp(method, gamma=0.05)(norm_net, *batch, attack(threat))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, norm_net), slopes)
    assert found > plain
    for name, buffer in norm_net.named_buffers():
        torch.testing.assert_close(buffer, dict(mirror.named_buffers())[name])


def test_awp_leaves_the_model_as_it_was(norm_net: nn.Module, batch: Batch) -> None:
    norm_net[1].weight.requires_grad_(False)
    norm_net[2].eval()
    before = copy.deepcopy(norm_net)
    storages = [t.data_ptr() for t in norm_net.state_dict().values()]
    awp(trades)(norm_net, *batch, attack(ThreatModel.linf(0.1))).backward()
    assert [t.data_ptr() for t in norm_net.state_dict().values()] == storages
    for (name, after), old in zip(norm_net.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(after, old), name
        assert after.requires_grad == old.requires_grad
        assert (after.grad is not None) == after.requires_grad
    modes = [m.training for m in norm_net.modules()]
    assert modes == [m.training for m in before.modules()]
    assert norm_net[1].num_batches_tracked == before[1].num_batches_tracked + 2
    assert not torch.equal(norm_net[1].running_mean, before[1].running_mean)


def test_awp_leaves_the_model_as_it_was_when_the_method_fails(
    norm_net: nn.Module, batch: Batch
) -> None:
    calls = []

    def fails(model: nn.Module, images: Tensor, labels: Tensor, a: Attack) -> Tensor:
        loss = pgd_at(model, images, labels, a)
        calls.append(model)
        if len(calls) == 2:
            with a.seen_by(model):
                raise RuntimeError("in the second pass")
        return loss

    before = copy.deepcopy(norm_net)
    with pytest.raises(RuntimeError, match="second pass"):
        awp(fails)(norm_net, *batch, attack(ThreatModel.linf(0.1)))
    assert all(map(torch.equal, norm_net.parameters(), before.parameters()))
    assert all(p.requires_grad and p.is_leaf for p in norm_net.parameters())
    assert all(m.training for m in norm_net.modules())


def test_awp_disturbs_trained_weights_of_two_dimensions_by_gamma(
    norm_net: nn.Module, batch: Batch
) -> None:
    seen: list[dict[str, Tensor]] = []
    norm_net[0].register_forward_hook(
        lambda m, i, o: seen.append({n: p.detach().clone() for n, p in norm_net.named_parameters()})
    )
    norm_net[4].weight.requires_grad_(False)

    def clean(model: nn.Module, images: Tensor, labels: Tensor, a: Attack) -> Tensor:
        return F.cross_entropy(model(images), labels)

    awp(clean, gamma=0.02)(norm_net, *batch, attack(ThreatModel.linf(0.1)))
    first, second = seen
    change = {name: (second[name] - first[name]).norm() / first[name].norm() for name in first}
    torch.testing.assert_close(change.pop("0.weight").item(), 0.02)
    assert all(moved == 0 for moved in change.values())


@pytest.mark.parametrize("gradients", ["none", "zero", "unused"])
def test_awp_where_there_is_nothing_to_disturb(batch: Batch, gradients: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).double()
    if gradients == "none":
        net[1].weight.requires_grad_(False)
    elif gradients == "unused":
        net.register_module("spare", nn.Linear(2, 2))
        net.forward = lambda images: net[1](net[0](images))  # type: ignore[method-assign]

    def method(model: nn.Module, images: Tensor, labels: Tensor, a: Attack) -> Tensor:
        scale = 0 if gradients == "zero" else 1
        return F.cross_entropy(scale * model(images), labels)

    found = awp(method)(net, *batch, attack(ThreatModel.linf(0.1)))
    plain = method(net, *batch, attack(ThreatModel.linf(0.1)))
    assert found.isfinite()
    assert found > plain if gradients == "unused" else torch.equal(found, plain)


def test_awp_replays_attacks_in_their_order(norm_net: nn.Module, batch: Batch) -> None:
    runs: list[list[Tensor]] = []

    def method(model: nn.Module, images: Tensor, labels: Tensor, a: Attack) -> Tensor:
        assert (a.threat, a.steps, a.label_smoothing) == (ThreatModel.linf(0.1), 3, 0.2)
        assert model.training
        moved = [a(model, images, labels), a.single_step(model, images, labels)]
        moved.append(a(model, images, labels, lambda logits: logits[:, 0]))
        runs.append(moved)
        return sum((a.cross_entropy(model(m), labels) for m in moved), torch.zeros(()))

    used = attack(ThreatModel.linf(0.1), label_smoothing=0.2)
    alone = attack(ThreatModel.linf(0.1), label_smoothing=0.2)
    awp(method)(norm_net, *batch, used)
    first, second = runs
    assert all(map(torch.equal, first, second))
    assert len({m.sum().item() for m in first}) == 3
    method(norm_net, *batch, alone)
    assert torch.equal(used.generator.get_state(), alone.generator.get_state())


@pytest.mark.parametrize("training", [False, True])
def test_awp_shows_the_mode_and_layout_of_the_model(
    norm_net: nn.Module, batch: Batch, training: bool
) -> None:
    norm_net.train(training)
    modes, strides = [], []
    norm_net[0].register_forward_hook(lambda m, i, o: strides.append(m.weight.stride()))

    def method(model: nn.Module, images: Tensor, labels: Tensor, a: Attack) -> Tensor:
        modes.append((model.training, norm_net[1].training))
        return F.cross_entropy(model(images), labels)

    images = batch[0].contiguous(memory_format=torch.channels_last)
    awp(method)(norm_net, images, batch[1], attack(ThreatModel.linf(0.1)))
    assert modes == [(training, training)] * 2
    assert strides == [norm_net[0].weight.stride()] * 2


def test_awp_attacks_anew_where_the_second_pass_asks_for_more(
    norm_net: nn.Module, batch: Batch
) -> None:
    calls = []

    def method(model: nn.Module, images: Tensor, labels: Tensor, a: Attack) -> Tensor:
        calls.append(1)
        for _ in calls:
            images = a(model, images, labels)
        return F.cross_entropy(model(images), labels)

    assert awp(method)(norm_net, *batch, attack(ThreatModel.linf(0.1))).isfinite()
    assert len(calls) == 2


def test_awp_attacks_the_model_itself_so_that_a_folded_copy_can_stand_for_it(
    norm_net: nn.Module, batch: Batch
) -> None:
    class Folded:
        asked: list[bool]

        def stands_for(self, model: nn.Module) -> bool:
            self.asked.append(model is norm_net)
            return self.asked[-1]

        def refreshed(self) -> nn.Module:
            return copy.deepcopy(norm_net).eval()

    folded = Folded()
    folded.asked = []
    awp(pgd_at)(norm_net, *batch, attack(ThreatModel.linf(0.1), folded=folded))
    assert folded.asked == [True]


@pytest.mark.parametrize("name", ["trades", "mart", "rslad"])
def test_awp_under_autocast(norm_net: nn.Module, batch: Batch, name: str) -> None:
    model = norm_net.float()
    method = awp(bound(name, teacher_like(model)))
    images, labels = batch[0].float(), batch[1]
    plain = copy.deepcopy(model)
    exact = gradient(method(plain, images, labels, attack(ThreatModel.linf(0.1))), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method(model, images, labels, attack(ThreatModel.linf(0.1)))
    assert loss.dtype == torch.float32
    found = gradient(loss, model)
    assert F.cosine_similarity(found, exact, dim=0) > 0.98


def test_awp_lowers_to_the_method_itself_as_gamma_vanishes(
    norm_net: nn.Module, batch: Batch
) -> None:
    plain = trades(copy.deepcopy(norm_net), *batch, attack(ThreatModel.linf(0.1)))
    found = awp(trades, gamma=1e-9)(norm_net, *batch, attack(ThreatModel.linf(0.1)))
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)
    with pytest.raises(UsageError, match=r"gamma 0 .*positive"):
        awp(trades, gamma=0.0)


def test_awp_twice_is_a_method_too(norm_net: nn.Module, batch: Batch) -> None:
    once = awp(pgd_at)(copy.deepcopy(norm_net), *batch, attack(ThreatModel.linf(0.1)))
    twice = awp(awp(pgd_at))(norm_net, *batch, attack(ThreatModel.linf(0.1)))
    assert twice > once


@pytest.mark.parametrize("name", NAMES)
def test_methods_by_name(name: str) -> None:
    assert resolve_method(name) == (name, METHODS.find(name))
    wrapped, function = resolve_method(f"{name}+awp")
    assert wrapped == f"{name}+awp"
    assert function.__wrapped__ is METHODS.find(name)  # type: ignore[attr-defined]
    assert is_single_step(name) == is_single_step(f"{name}+awp") == (name == "n-fgsm")


def test_methods_by_path_and_function() -> None:
    path = "robust_prune.finetune.methods.pgd_at:pgd_at"
    assert resolve_method(path) == (path, pgd_at)
    assert resolve_method(f"{path}+awp")[1].__wrapped__ is pgd_at  # type: ignore[attr-defined]
    assert resolve_method(pgd_at) == ("pgd_at", pgd_at)
    assert resolve_method(awp(pgd_at))[0] == "pgd_at+awp"
    assert not is_single_step(path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("free-at", "'free-at' is not known; use one of ard, mart, n-fgsm, pgd-at, rslad, trades"),
        ("free-at+awp", r"'free-at\+awp' is not known"),
        ("trades+awp+awp", "is not known"),
        ("+awp", "is not known"),
        ("", "is not known"),
        (":function", "is not known"),
        ("module:", "is not known"),
        (".relative:function", "is not known"),
        ("no.such.module:f", "can't be imported: No module named 'no'"),
        ("robust_prune.finetune:nothing", "can't be imported: .*nothing"),
        ("robust_prune.finetune.methods.trades:BETA", "not a function but of type float"),
    ],
)
def test_methods_that_are_not_there(wrong: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as told:
        resolve_method(wrong)
    assert "\n" not in str(told.value)


def test_teachers_are_asked_for_and_bound(net: nn.Module, batch: Batch) -> None:
    wanting = {name for name in METHODS if needs_teacher(resolve_method(name)[1])}
    assert wanting == {"rslad", "ard"}
    assert wanting == {name for name in METHODS if needs_teacher(resolve_method(f"{name}+awp")[1])}

    def optional(m: nn.Module, i: Tensor, y: Tensor, a: Attack, teacher: object = None) -> Tensor:
        return torch.zeros(())

    assert needs_teacher(optional)
    assert not needs_teacher(type)  # has no signature to read
    teacher, threat = teacher_like(net), ThreatModel.linf(0.1)
    for outer in (bind(awp(rslad), teacher), awp(bind(rslad, teacher))):
        assert not needs_teacher(outer)
        given = awp(rslad)(net, *batch, attack(threat), teacher=teacher)
        torch.testing.assert_close(outer(net, *batch, attack(threat)), given)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("around", [False, True])
def test_the_attack_s_precision_is_its_own(bfloat16: bool, around: bool) -> None:
    """Whatever autocast is around it, and logits always come in the images' type."""
    model = tiny_resnet()
    seen: list[torch.dtype] = []
    model.net.fc.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = attack(ThreatModel.linf("8/255"), bfloat16=bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=around), made.seen_by(model) as module:
        assert module(images).dtype == torch.float32
    assert seen == [torch.bfloat16 if bfloat16 else torch.float32]


def test_losses_are_in_float32_under_autocast() -> None:
    model = tiny_resnet()
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with float32_logits(model), torch.autocast("cpu", torch.bfloat16):
        assert model(images).dtype == torch.float32
        loss = trades(model, images, torch.arange(4), attack(ThreatModel.linf("8/255")))
    assert loss.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).dtype == torch.bfloat16  # the hook is gone
