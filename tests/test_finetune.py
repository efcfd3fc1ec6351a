"""Training: losses against their definitions, and a loop that learns, selects and restores."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robust_prune import builders
from robust_prune.data import DataSplits, as_split
from robust_prune.errors import TrainingError, UsageError
from robust_prune.finetune import METHODS, resolve
from robust_prune.finetune.attack import Attack
from robust_prune.finetune.loop import EpochRecord, TrainingConfig, _collapses, train_
from robust_prune.modules import ImageModel
from robust_prune.types import ThreatModel
from tests.conftest import TINY, tiny_resnet


def attack(threat: ThreatModel, steps: int = 3, seed: int = 0) -> Attack:
    return Attack(threat, steps, torch.Generator().manual_seed(seed))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 5)).double()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 4, 4, generator=generator).double(), torch.arange(6) % 5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_losses_and_gradients_are_those_written_out(
    net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], norm: str
) -> None:
    images, labels = batch
    threat = ThreatModel(norm, 0.1)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])

    found = METHODS["pgd-at"](net, images, labels, attack(threat))
    moved = attack(threat)(net, images, labels)
    expected = -net(moved).log_softmax(1)[torch.arange(6), labels].mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found), gradient(expected))

    found = METHODS["trades"](net, images, labels, attack(threat))
    clean = net(images).softmax(1)
    still = clean.detach()
    moved = attack(threat)(
        net, images, labels, lambda z: (still * (still.log() - z.log_softmax(1))).sum(1)
    )
    divergence = (clean * (clean.log() - net(moved).log_softmax(1))).sum(1).mean()
    expected = F.cross_entropy(net(images), labels) + 6 * divergence
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found), gradient(expected))


def test_n_fgsm_is_noise_of_two_eps_and_one_step_of_eps(
    net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    images, labels = batch
    found = METHODS["n-fgsm"](net, images, labels, attack(ThreatModel.linf(0.1)))
    generator = torch.Generator().manual_seed(0)
    noise = (2 * torch.rand(images.shape, generator=generator, dtype=images.dtype) - 1) * 0.2
    start = (images + noise).requires_grad_(True)
    (slope,) = torch.autograd.grad(F.cross_entropy(net(start), labels), start)
    expected = F.cross_entropy(net(start.detach() + 0.1 * slope.sign()), labels)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", list(METHODS))
def test_attacks_see_eval_mode_and_the_loss_train_mode(method: str, threat: ThreatModel) -> None:
    model = tiny_resnet().train()
    seen = []
    model.net.bn1.register_forward_hook(lambda m, i, o: seen.append(m.training))
    METHODS[method](model, torch.rand(4, 3, 32, 32), torch.arange(4), attack(threat))
    assert seen[-1]
    assert not all(seen)
    assert model.training


def small_digits_model(digits: DataSplits) -> ImageModel:
    mean, std = digits.statistics()
    spec = builders.resolve(
        "resnet18", {"num_classes": 10, "in_chans": 1, **TINY}, cifar_stem=True, mean=mean, std=std
    )
    torch.manual_seed(0)
    return builders.create(spec)


@pytest.mark.parametrize("method", list(METHODS))
def test_each_method_makes_a_network_robust_on_digits(method: str, digits: DataSplits) -> None:
    model = small_digits_model(digits)
    config = TrainingConfig(
        method,
        epochs=5,
        threat=ThreatModel.linf(0.06),
        steps=3,
        batch_size=32,
        lr=0.1,
        clean_epochs=2,
        augment=False,
    )
    history = train_(model, digits.train, digits.validation, config)
    best = history.epochs[history.best_epoch]
    assert best.robust > 0.5
    assert best.clean > 0.8
    assert not model.training


def test_the_best_epoch_is_kept_and_the_last_is_not(digits: DataSplits) -> None:
    model = small_digits_model(digits)
    states, calls = [], []

    def method(m: nn.Module, images: torch.Tensor, labels: torch.Tensor, a: Attack) -> torch.Tensor:
        calls.append(1)
        loss = F.cross_entropy(m(images), labels)
        return loss if len(calls) <= 80 else -loss  # learns, then unlearns

    config = TrainingConfig(
        method,
        epochs=4,
        threat=ThreatModel.linf(0.02),
        batch_size=32,
        lr=0.05,
        warmup=0.0,
    )
    history = train_(
        model,
        digits.train,
        digits.validation,
        config,
        on_epoch=lambda e: states.append(copy.deepcopy(model.state_dict())),
    )
    assert history.best_epoch in (1, 2)
    robust = [e.robust for e in history.epochs]
    assert robust[history.best_epoch] == max(robust) > robust[-1]
    kept = states[history.best_epoch]
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_a_run_repeats_for_a_seed_and_leaves_the_global_generator_alone(
    digits: DataSplits,
) -> None:
    config = TrainingConfig("pgd-at", epochs=1, threat=ThreatModel.linf(0.06), steps=2, seed=4)
    before = torch.get_rng_state()
    one, two = small_digits_model(digits), small_digits_model(digits)
    torch.set_rng_state(before)
    train_(one, digits.train, digits.validation, config)
    assert torch.equal(torch.get_rng_state(), before)
    train_(two, digits.train, digits.validation, config)
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


def test_ctrl_c_keeps_the_best_epoch_so_far(digits: DataSplits) -> None:
    model = small_digits_model(digits)

    def stop(progress: object) -> None:
        if progress.epoch == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    config = TrainingConfig("n-fgsm", epochs=5, threat=ThreatModel.linf(0.06), clean_epochs=5)
    history = train_(model, digits.train, digits.validation, config, on_progress=stop)
    assert history.interrupted
    assert len(history.epochs) == 2
    assert not model.training


def test_a_loss_that_is_not_finite_stops_with_the_weights_before_it(digits: DataSplits) -> None:
    model = small_digits_model(digits)
    before = copy.deepcopy(model.state_dict())

    def method(m: nn.Module, images: torch.Tensor, labels: torch.Tensor, a: Attack) -> torch.Tensor:
        return m(images).sum() * math.nan

    config = TrainingConfig(method, epochs=1, threat=ThreatModel.linf(0.06))
    with pytest.raises(TrainingError, match="lower learning rate"):
        train_(model, digits.train, digits.validation, config)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_methods_by_name_path_and_function() -> None:
    assert resolve("trades")[1] is METHODS["trades"]
    name, function = resolve("robust_prune.finetune.pgd_at:pgd_at")
    assert (name, function) == ("robust_prune.finetune.pgd_at:pgd_at", METHODS["pgd-at"])
    assert resolve(function)[0] == "pgd_at"
    for wrong in ("free-at", "no.such.module:f", "robust_prune.finetune:nothing"):
        with pytest.raises(UsageError):
            resolve(wrong)


def test_a_frozen_model_is_an_error(digits: DataSplits) -> None:
    model = small_digits_model(digits).requires_grad_(False)
    config = TrainingConfig("pgd-at", epochs=1, threat=ThreatModel.linf(0.06))
    with pytest.raises(TrainingError, match="frozen"):
        train_(model, digits.train, digits.validation, config)


def test_a_last_batch_of_one_image_is_no_problem() -> None:
    model = tiny_resnet()
    split = as_split((torch.rand(9, 3, 32, 32), torch.arange(9)))
    config = TrainingConfig("n-fgsm", epochs=1, threat=ThreatModel.linf("8/255"), batch_size=8)
    assert len(train_(model, split, split, config).epochs) == 2


def test_catastrophic_overfitting_is_told() -> None:
    def record(epoch: int, clean: float, robust: float) -> EpochRecord:
        return EpochRecord(epoch, 1.0, clean, robust, 0.0)

    good = [record(0, 0.3, 0.2), record(1, 0.5, 0.3), record(2, 0.55, 0.28)]
    assert _collapses(good) == ()
    broken = [*good, record(3, 0.8, 0.01)]
    assert "epoch 3: robust 28.0 -> 1.0 %" in _collapses(broken)[0]
    assert _collapses([*good, record(3, 0.1, 0.1)]) == ()  # everything broke: not this fault
