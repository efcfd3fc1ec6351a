"""A network trained robustly at many widths at once, which then says which widths are best."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robust_prune.adversaries import adversarial_loss, adversarial_set
from robust_prune.finetune import Attack
from robust_prune.graph import ModelGraph
from robust_prune.modules import network_of
from robust_prune.types import ThreatModel

Widths = Mapping[str, int]


class Narrowed(nn.Module):
    """A model at other widths: nothing reads the units that are gone, weights stay shared.

    Args:
        model: gives logits [N, K].
        graph: of it.
        scores: [units] by group; the lowest go first.
    """

    def __init__(self, model: nn.Module, graph: ModelGraph, scores: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self._graph = graph
        self._orders = {name: units.argsort() for name, units in scores.items()}
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._inner = dict(network_of(model).named_parameters())
        self.masks: dict[str, Tensor] = {}

    def to_widths(self, widths: Widths) -> None:
        """Take these widths, channels by group, from now on."""
        self.masks = {}
        for group in self._graph.groups:
            gone = round((group.width - widths[group.name]) * group.units / group.width)
            dropped = torch.zeros(group.units, dtype=torch.bool)
            dropped[self._orders[group.name][:gone]] = True
            for slot in self._graph.readers(group.name):
                weight = self._inner[slot.tensor]
                name = self._names[id(weight)]
                mask = self.masks.setdefault(name, torch.ones_like(weight))
                mask.index_fill_(slot.dim, slot.indices[dropped[slot.units]], 0.0)

    def forward(self, images: Tensor) -> Tensor:
        weights = dict(self.model.named_parameters())
        shown = {name: weights[name] * mask for name, mask in self.masks.items()}
        logits: Tensor = functional_call(self.model, shown, (images,))
        return logits


class TrainAtWidths:
    """PGD-AT where every batch is seen at the widths of one of many plans, the dense among them.

    Args:
        narrowed: around the model that is trained.
        plans: widths to draw from.
        seed: of the draws.
    """

    def __init__(self, narrowed: Narrowed, plans: Sequence[Widths], seed: int) -> None:
        self.narrowed, self.plans, self.draw = narrowed, plans, random.Random(seed)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, attack: Attack) -> Tensor:
        self.narrowed.to_widths(self.draw.choice(self.plans))
        self.narrowed.train(model.training)
        adversarial = attack(self.narrowed, images, labels)
        return attack.cross_entropy(self.narrowed(adversarial), labels)


def losses(
    narrowed: Narrowed,
    plans: Mapping[str, Widths],
    known: tuple[Tensor, Tensor],
    threat: ThreatModel,
) -> dict[str, float]:
    """Return by plan the adversarial loss of the shared weights at its widths, each attacked."""
    found = {}
    for name, widths in plans.items():
        narrowed.to_widths(widths)
        attacked = adversarial_set(narrowed, *known, threat=threat, seed=0)
        found[name] = adversarial_loss(narrowed, attacked)
    return found
