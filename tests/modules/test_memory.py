"""Batches are halved where memory runs out, with the same result, and it is said."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import robust_prune as rp
from robust_prune.adversaries import (
    adversarial_loss,
    adversarial_set,
    gradients_of,
    pgd_verdicts,
)
from robust_prune.criteria import ascent, channel_scores, first_order
from robust_prune.errors import MemoryFullError
from robust_prune.finetune import Attack, gradients_
from robust_prune.graph import ModelGraph
from robust_prune.modules import as_memory_allows, predict, telling_of_memory
from robust_prune.repair import recalibrate_batchnorm_
from robust_prune.types import ThreatModel
from tests.conftest import OwnNet

CPU_ERROR = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B"
THREATS = ThreatModel.linf(0.03), ThreatModel.l2(0.5)


@contextmanager
def at_most(model: nn.Module, images: int, error: Exception | None = None) -> Iterator[None]:
    """Let a model run out of memory with more images than these."""

    def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > images:
            raise error or torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError(CPU_ERROR)]
)
def test_a_batch_is_halved_until_it_fits_once_for_all_and_that_is_told(error: Exception) -> None:
    sizes: list[int] = []
    told: list[str] = []

    def work(size: int) -> int:
        sizes.append(size)
        if size > 3:
            raise error
        return size

    with telling_of_memory(told.append):
        assert as_memory_allows(work, 20, "attacks") == 2
        assert as_memory_allows(work, 20, "attacks") == 2
        assert as_memory_allows(work, 1, "attacks") == 1
        assert sizes == [20, 10, 5, 2, 2, 1]
        assert as_memory_allows(work, 3, "losses") == 3
    assert told[0] == (
        "memory does not suffice for attacks of 20 images at a time: 10 are taken from here on"
    )
    assert len(told) == 3


def test_outside_of_a_run_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    net = OwnNet().eval()
    with at_most(net, 4):
        assert len(predict(net, torch.rand(8, 3, 8, 8))) == 8
    assert ["memory does not suffice for predictions of 8" in r.message for r in caplog.records]


def test_what_even_one_image_does_not_fit_is_one_line_and_other_errors_are_errors() -> None:
    net = OwnNet().eval()
    with at_most(net, 0), pytest.raises(MemoryFullError, match="not even with 1 image at a time"):
        predict(net, torch.rand(8, 3, 8, 8))
    with at_most(net, 0, RuntimeError("shapes")), pytest.raises(RuntimeError, match="shapes"):
        predict(net, torch.rand(8, 3, 8, 8))


def test_what_a_failed_pass_held_is_free_before_the_next() -> None:
    held: list[weakref.ref[Tensor]] = []

    def work(size: int) -> None:
        assert all(reference() is None for reference in held)
        large = torch.zeros(size)
        held.append(weakref.ref(large))
        if size > 1:
            raise torch.OutOfMemoryError

    as_memory_allows(work, 4, "work")
    assert len(held) == 3


@pytest.fixture(scope="module")
def scene() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = OwnNet().double().eval()
    return model, torch.rand(12, 3, 8, 8, dtype=torch.float64), torch.arange(12) % 5


Scene = tuple[nn.Module, Tensor, Tensor]


def measured(
    threat: ThreatModel, model: nn.Module, images: Tensor, labels: Tensor
) -> dict[str, Any]:
    """What attacks and measurements give, six images at a time."""
    options: dict[str, Any] = {"threat": threat, "steps": 3, "seed": 0, "batch_size": 6}
    attacked = adversarial_set(model, images, labels, **options)
    graph = ModelGraph(model, (3, 8, 8))
    return {
        "images": attacked.images,
        "verdicts": pgd_verdicts(model, images, labels, **options),
        "loss": adversarial_loss(model, attacked),
        "first order": first_order(model, attacked, rho=0.1),
        "ascent": ascent(model, attacked, rho=0.1, epochs=1),
        "taylor": channel_scores(model, graph, score="taylor", adversarial=attacked),
        "fisher": channel_scores(model, graph, score="fisher", adversarial=attacked),
    }


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("most", [4, 1])
def test_measurements_are_the_same_in_parts(most: int, threat: ThreatModel, scene: Scene) -> None:
    expected = measured(threat, *scene)
    with at_most(scene[0], most), telling_of_memory(lambda line: None) as told:
        found = measured(threat, *scene)
    assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert {line.split(" for ")[1].split(" of ")[0] for line in told} == {
        *("attacks", "losses", "gradients")
    }


def test_gradients_of_a_step_add_up_to_those_of_the_batch(scene: Scene) -> None:
    model, images, labels = scene
    attack = Attack(THREATS[0], steps=1, generator=torch.Generator())

    def step() -> tuple[float, list[Tensor]]:
        loss = gradients_(model, images, labels, attack, None, seed=0, share=0.5)
        return loss, [p.grad for p in model.parameters() if p.grad is not None]

    expected = step()
    with at_most(model, 5):
        assert_close(step(), expected, rtol=1e-9, atol=1e-12)
    _, whole = gradients_of(model, list(model.parameters()), images, labels, "mean")
    for half, gradient in zip(expected[1], whole, strict=False):
        assert_close(2 * half, gradient)
    model.zero_grad(set_to_none=True)


def test_gradients_are_those_of_torch_and_are_there_once() -> None:
    """One weight in two layers, two weights that are given one tensor, one that is unused."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.left, self.right, self.unused = (nn.Parameter(torch.rand(4)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = self.second(self.first(x).tanh()) + (self.left + self.right)
            return mixed

    net = Net().double()
    images, labels = torch.rand(10, 4).double(), torch.randint(4, (10,))
    weights = [net.first.weight, net.second.weight, net.left, net.right, net.unused]
    loss = F.cross_entropy(net(images), labels, reduction="sum")
    expected = torch.autograd.grad(loss, weights, allow_unused=True)
    alive = []
    net.right.register_hook(lambda g: alive.append(g.abs().sum()))
    for size in (None, 3):
        total, found = gradients_of(net, weights, images, labels, "sum", size)
        assert total == pytest.approx(float(loss))
        assert found[4] is expected[4] is None
        assert_close(found[:4], list(expected[:4]))
        assert found[2] is not found[3]
    assert len(alive) == 1 + 4, "hooks of a user hear of each part"
    assert not any(w.grad is not None or len(w._backward_hooks or ()) > 1 for w in weights)


def test_statistics_of_batch_norms_count_no_failed_pass() -> None:
    torch.manual_seed(0)
    net = OwnNet().eval()
    images = torch.rand(8, 3, 8, 8)
    parts = [(part, torch.zeros(4)) for part in images.split(4)]
    expected = copy.deepcopy(net)
    recalibrate_batchnorm_(expected, parts)
    with at_most(net.hidden, 4):  # behind the norm
        recalibrate_batchnorm_(net, [(images, torch.zeros(8))])
    assert_close(net.norm.state_dict(), expected.norm.state_dict())


def data(n: int = 48) -> list[tuple[Tensor, Tensor]]:
    return [(torch.rand(n, 3, 8, 8), torch.arange(n) % 5)]


def out_of_memory_in(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    forward: Callable[..., Tensor] = OwnNet.forward

    def checked(self: OwnNet, images: Tensor) -> Tensor:
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, images)

    monkeypatch.setattr(OwnNet, "forward", checked)


def test_a_run_goes_on_in_smaller_batches_and_its_report_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out_of_memory_in(monkeypatch, 3)
    torch.manual_seed(0)
    options: dict[str, Any] = {"calibration_images": 8, "prune_ratio": 0.3, "attack_steps": 1}
    result = rp.compress(
        OwnNet().eval(),
        data(),
        test=data(6),
        finetune="pgd-at",
        epochs=1,
        batch_size=8,
        evaluation="pgd",
        n_eval=6,
        **options,
    )
    told = {n.split(" for ")[1].split(" of ")[0] for n in result.report["notes"] if " suffice" in n}
    assert told >= {"attacks", "training", "batch-norm statistics"}
    assert any("batch norms see these parts" in note for note in result.history.notes)


def test_an_evaluation_says_it_beside_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, judged = OwnNet().eval(), partial(rp.evaluate, attack="pgd", n=12)
    expected = judged(net, images := data(12))
    out_of_memory_in(monkeypatch, 7)
    found = judged(net, images)
    for mine, other in zip(found.measurements, expected.measurements, strict=True):
        assert mine.correct == other.correct
        assert "memory" not in other.details
        assert "suffice for" in mine.details["memory"][0]
