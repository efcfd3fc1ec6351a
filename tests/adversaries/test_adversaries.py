"""Attacks against a linear model, whose boundary is known, and against pyautoattack itself."""

from __future__ import annotations

import sys

import numpy as np
import pyautoattack
import pytest
import torch
from torch import nn

from robust_prune.adversaries import (
    autoattack,
    pgd,
    project,
    quick,
    random_start,
    survivors,
)
from robust_prune.adversaries.quick import Quick
from robust_prune.errors import AttackError
from robust_prune.types import ThreatModel
from tests.conftest import tiny_resnet
from tests.oracles import linear_classifier, near_middle
from tests.shortened import shorten


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_crosses_a_plane_just_when_the_plane_is_in_reach(norm: str) -> None:
    model = linear_classifier()
    images = near_middle(200, model.shape)
    labels = model(images).argmax(1)
    distance = model.distance(images, norm).detach()
    eps = float(distance.median())
    moved = pgd(model, images, labels, threat=ThreatModel(norm, eps), steps=50)
    fooled = model(moved).argmax(1) != labels
    clear = (distance / eps - 1).abs() > 0.01
    assert clear.sum() > 150
    assert torch.equal(fooled[clear], (distance < eps)[clear])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_uses_the_whole_budget_on_a_plane_and_no_more(norm: str) -> None:
    model = linear_classifier()
    images = near_middle(50, model.shape)
    threat = ThreatModel(norm, 0.02)
    moved = pgd(model, images, model(images).argmax(1), threat=threat, steps=40)
    delta = (moved - images).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert size.max() <= threat.eps * (1 + 1e-9)
    assert size.min() >= threat.eps * 0.99


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_survivors_are_right_on_every_iterate(norm: str) -> None:
    model = tiny_resnet().double()
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(40, 3, 32, 32, generator=generator).double()
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 10  # wrong from the start
    threat = ThreatModel(norm, 0.01 if norm == "linf" else 0.4)  # type: ignore[arg-type]
    iterates = [images] + [
        pgd(
            model,
            images,
            labels,
            threat=threat,
            steps=steps,
            step_size=threat.eps / 4,
            generator=torch.Generator().manual_seed(0),
        )
        for steps in (1, 2, 3, 4, 5)
    ]
    with torch.no_grad():
        right = torch.stack([model(x).argmax(1) == labels for x in iterates]).all(0)
    found, blind = survivors(
        model,
        images,
        labels,
        threat=threat,
        steps=5,
        step_size=threat.eps / 4,
        start=random_start(images, threat, torch.Generator().manual_seed(0)),
    )
    assert torch.equal(found, right)
    assert not blind.any()
    assert 4 <= int(right.sum()) <= 28
    assert not found[::5].any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_perturbations_stay_in_the_ball_and_in_the_box(norm: str) -> None:
    images = torch.rand(64, 3, 8, 8).round(decimals=1)
    threat = ThreatModel(norm, 0.3)
    delta = project(5 * torch.randn_like(images), images, threat)
    size = delta.flatten(1).abs().amax(1) if norm == "linf" else delta.flatten(1).norm(dim=1)
    assert size.max() <= threat.eps + 1e-6
    assert (images + delta).min() >= 0
    assert (images + delta).max() <= 1


def test_random_start_fills_the_l2_ball_uniformly() -> None:
    images = torch.zeros(4000, 1, 2, 2, dtype=torch.float64)
    noise = random_start(images, ThreatModel.l2(2.0), torch.Generator().manual_seed(0))
    radius = noise.flatten(1).norm(dim=1) / 2
    share = (radius < 0.5 ** (1 / 4)).double().mean()  # half of the volume, in 4 dimensions
    assert abs(float(share) - 0.5) < 0.03


def test_pgd_leaves_no_gradient_on_the_parameters() -> None:
    model = tiny_resnet()
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    pgd(model, images, labels, threat=ThreatModel.linf("8/255"), steps=2)
    assert all(p.grad is None for p in model.parameters())


def test_pgd_repeats_for_a_seed() -> None:
    model, images = tiny_resnet(), torch.rand(4, 3, 32, 32)
    runs = [
        pgd(
            model,
            images,
            torch.zeros(4, dtype=torch.long),
            threat=ThreatModel.linf(0.1),
            steps=3,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (5, 5, 6)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


class Small(nn.Module):
    """A small smooth network with any number of classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(108, 16), nn.Tanh(), nn.Linear(16, classes)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)


def small_problem(classes: int, n: int = 24) -> tuple[Small, torch.Tensor, torch.Tensor]:
    model = Small(classes).eval()
    images = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[:3] = (labels[:3] + 1) % classes  # some that are wrong from the start
    return model, images, labels


@pytest.mark.parametrize(("norm", "batch_size"), [("linf", 8), ("l2", 12)])
def test_autoattack_gives_pyautoattacks_own_verdicts(
    norm: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if norm == "l2":
        shorten(monkeypatch)
    model, images, labels = small_problem(classes=10, n=12)
    threat = ThreatModel(norm, 0.03 if norm == "linf" else 0.12)
    ours = autoattack(
        model, images, labels, threat=threat, seed=3, batch_size=batch_size, stand_in=False
    )
    theirs = pyautoattack.AutoAttack(
        model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=threat.eps, seed=3
    )
    x_adv, y_adv = theirs.run_standard_evaluation(images, labels, batch_size=batch_size)
    assert torch.equal(ours.robust, y_adv == labels)
    assert torch.equal(ours.images, x_adv)
    assert 0 < int(ours.robust.sum()) < int((model(images).argmax(1) == labels).sum())
    assert min(ours.robust_after.values()) == int((y_adv == labels).sum())


def test_autoattack_on_a_stand_in_gives_the_same_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    model, images, labels = small_problem(classes=10, n=12)
    assert isinstance(quick(model, images), Quick)
    exact, quicker = (
        autoattack(model, images, labels, threat=ThreatModel.linf(0.03), seed=3, stand_in=stand_in)
        for stand_in in (False, True)
    )
    assert torch.equal(quicker.robust, exact.robust)
    assert quicker.robust_after == exact.robust_after


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_autoattack_runs_with_few_classes_and_says_what_it_left_out(
    classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch)
    model, images, labels = small_problem(classes, n=8)
    result = autoattack(model, images, labels, threat=ThreatModel.linf(0.02), seed=0)
    assert any(f"aim at {classes - 1} classes" in flag for flag in result.flags)
    assert ("apgd-t" in result.attacks) == (classes >= 4)


def test_autoattack_restores_random_state_trace_and_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    model, images, labels = small_problem(classes=4, n=4)
    model.train()
    torch.manual_seed(11)
    np.random.seed(11)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    traced = []

    def trace(frame: object, event: str, arg: object) -> None:
        traced.append(event)

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        autoattack(model, images, labels, threat=ThreatModel.linf(0.02), seed=0)
        kept = sys.gettrace()
    finally:
        sys.settrace(old)
    assert kept is trace
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_autoattack_refuses_logits_that_are_not_finite() -> None:
    model, images, labels = small_problem(classes=4, n=4)
    with torch.no_grad():
        model.net[3].bias.fill_(float("nan"))
    with pytest.raises(AttackError, match="not finite"):
        autoattack(model, images, labels, threat=ThreatModel.linf(0.02), seed=0)


def test_autoattack_refuses_images_too_small_for_its_l2_square() -> None:
    model, images, labels = small_problem(classes=4, n=4)
    with pytest.raises(AttackError, match="5 pixels"):
        autoattack(model, images[..., :4], labels, threat=ThreatModel.l2(0.1), seed=0)


def test_autoattack_shows_its_own_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)

    class Probabilities(Small):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images).softmax(1)

    _, images, labels = small_problem(classes=5, n=4)
    result = autoattack(
        Probabilities(5).eval(), images, labels, threat=ThreatModel.linf(0.02), seed=0
    )
    assert any("probability distribution" in flag for flag in result.flags)
