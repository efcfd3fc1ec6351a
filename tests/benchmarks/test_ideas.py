"""Ideas for a lasting win: what a supernet shows, what is learnt from, how they are compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from benchmarks.ideas.__main__ import Found, page
from benchmarks.ideas.methods import augmented, own_augmentations, teacher_both
from benchmarks.ideas.supernet import Narrowed, TrainAtWidths
from benchmarks.ideas.trying import BASE, IDEAS, PEER
from robust_prune.allocation import Problem, allocate_evenly, make_plan
from robust_prune.criteria import channel_scores
from robust_prune.finetune import Attack
from robust_prune.graph import ModelGraph
from robust_prune.modules import ImageModel
from robust_prune.types import Budget, ThreatModel
from tests.conftest import tiny_resnet

SIZE = (3, 32, 32)
LINF = ThreatModel.linf("8/255")


def narrowed_resnet() -> tuple[ImageModel, ModelGraph, Narrowed, dict[str, int]]:
    model = tiny_resnet(num_classes=5)
    graph = ModelGraph(model, SIZE)
    scores = channel_scores(model, graph, score="l2", adversarial=None)
    widths = allocate_evenly(Problem(graph.groups, graph.cost, Budget("macs", 0.5)))
    return model, graph, Narrowed(model, graph, scores), dict(widths)


def test_a_supernet_shows_what_pruning_to_its_widths_gives() -> None:
    model, graph, narrowed, widths = narrowed_resnet()
    x = torch.rand(2, *SIZE)
    whole = model(x)
    assert_close(narrowed(x), whole)
    narrowed.to_widths(widths)
    shown = narrowed(x)
    assert not torch.allclose(shown, whole)
    scores = channel_scores(model, graph, score="l2", adversarial=None)
    problem = Problem(graph.groups, graph.cost, Budget("macs", 0.5))
    units = {name: each.tolist() for name, each in scores.items()}
    graph.apply_(
        make_plan(problem, widths, units, allocation="even", score="l2", seed=0, input_size=SIZE)
    )
    assert_close(model(x), shown)


def test_training_at_widths_teaches_what_is_left_alone() -> None:
    model, _, narrowed, widths = narrowed_resnet()
    method = TrainAtWidths(narrowed, [widths], seed=0)
    images, labels = torch.rand(4, *SIZE), torch.arange(4)
    model.train()
    method(model, images, labels, Attack(LINF, 1, torch.Generator())).backward()
    masked = {name: mask for name, mask in narrowed.masks.items() if not mask.all()}
    assert masked
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, mask in masked.items():
        gradient = gradients[name]
        assert gradient is not None
        assert gradient[mask == 0].abs().max() == 0
        assert gradient[mask == 1].abs().max() > 0


class Sure(nn.Module):
    """A teacher that is as sure of class 1 as an image is bright."""

    def forward(self, images: Tensor) -> Tensor:
        bright = 10 * images.mean((1, 2, 3))
        return torch.stack([torch.zeros_like(bright), bright, -bright], 1)


def test_augmented_images_are_images() -> None:
    images = torch.rand(8, *SIZE)
    found = augmented(images)
    assert found.shape == images.shape
    assert found.min() >= 0
    assert found.max() <= 1
    assert not torch.equal(found, images)


def test_the_surest_take_the_place_of_originals() -> None:
    images = torch.full((8, *SIZE), 0.1)
    images[6:] = 0.9
    seen: list[tuple[Tensor, Tensor]] = []

    def attack(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        seen.append((x, labels))
        return x

    attack.cross_entropy = nn.functional.cross_entropy  # type: ignore[attr-defined]
    labels = torch.full((8,), 2)
    own_augmentations(Sure(), images, labels, attack, teacher=Sure())  # type: ignore[arg-type]
    ((mixed, targets),) = seen
    assert torch.equal(mixed[:6], images[:6])
    assert targets.tolist() == [2] * 6 + [1, 1]


def test_a_teacher_that_agrees_adds_nothing() -> None:
    model, images = Sure(), torch.rand(4, *SIZE)
    labels = torch.ones(4, dtype=torch.long)
    attack = Attack(LINF, 1, torch.Generator().manual_seed(0))
    alone = teacher_both(model, images, labels, attack, teacher=Sure())
    attack.generator.manual_seed(0)
    attacked = attack(model, images, labels)
    assert_close(alone, 0.5 * nn.functional.cross_entropy(model(attacked), labels))


def test_ideas_are_compared_with_the_plain_way_on_the_same_images() -> None:
    def found(name: str, verdicts: str, seed: int = 0) -> Found:
        return Found(name, seed, 10, 5, "d", verdicts, verdicts, verdicts, 1.0)

    rows = page([found(BASE, "1" * 50 + "0" * 50), found("awp", "1" * 60 + "0" * 40)])
    assert "| awp | 1 |" in rows
    assert "+10.0 | p = 0.002 |" in rows
    alone = page([found(PEER, "10"), found(BASE, "10", seed=1)])
    assert alone.splitlines()[3].endswith("|  |  |")
    assert set(IDEAS) >= {BASE, PEER}
