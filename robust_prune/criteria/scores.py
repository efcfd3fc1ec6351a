"""Channel scores: which channels of a group go first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from robust_prune.adversaries import AdversarialSet
from robust_prune.errors import UsageError
from robust_prune.graph import Group, Groups, Importance, Slot
from robust_prune.modules import evaluating, network_of, requires_grad
from robust_prune.repair import dense_moments

Score = Literal["l2", "taylor", "fisher", "reconstruction"]
SCORES: tuple[Score, ...] = ("l2", "taylor", "fisher", "reconstruction")
DAMPING = 0.01  # of the mean squared input, for inverting second moments


def channel_scores(
    model: nn.Module,
    graph: Groups,
    *,
    score: Score = "taylor",
    adversarial: AdversarialSet | None = None,
) -> dict[str, Tensor]:
    """Score every unit of every group, group by group as a pruner does; the lowest go first.

    Args:
        model: left as it was.
        graph: its groups.
        score: as `ChannelImportance` has them.
        adversarial: images to take gradients or activations on.

    Returns:
        By group, float64 scores [units] on the CPU; comparable between groups for `taylor` and
        `fisher` alone.
    """
    importance = ChannelImportance(model, score, adversarial)
    found: dict[str, Tensor] = {}
    for item in graph.groups:
        group = graph.group_of(item.name)
        found |= group.by_unit(importance(group))
    return found


class ChannelImportance(Importance):  # type: ignore[misc]
    """Scores of channels as one of torch-pruning's importances: for its pruners, and `compress`.

    Gradients and activations are measured for all groups of a graph at once, and anew when the
    model has changed.
    """

    def __init__(
        self, model: nn.Module, score: Score = "taylor", adversarial: AdversarialSet | None = None
    ) -> None:
        """Choose what a channel is scored by.

        Args:
            model: left as it was.
            score: `l2`, the group's weight norm; `taylor` and `fisher`, the change of the
                adversarial loss when the unit goes, to first and second order; `reconstruction`,
                what its readers' outputs lose when the others make up for it.
            adversarial: images to take gradients or activations on; all but `l2` need them.
        """
        if score not in SCORES:
            raise UsageError(f"score {score!r} is not known; use one of {', '.join(SCORES)}")
        if score != "l2" and adversarial is None:
            raise UsageError(f"score {score!r} needs adversarial images; use 'l2' without data")
        self._model, self._score, self._adversarial = model, score, adversarial
        self._measured: tuple[Groups, Any, Mapping[str, Tensor]] | None = None

    def __call__(self, group: Group) -> Tensor:
        """Return float64 scores [indices of the group's root] on the CPU."""
        return group.at_root(self.of_units(group.graph))

    def of_units(self, graph: Groups) -> Mapping[str, Tensor]:
        """Return by group the scores [units] of all groups of a graph."""
        state = tuple((id(p), p._version) for p in self._model.parameters())
        if self._measured is None or self._measured[0] is not graph or self._measured[1] != state:
            self._measured = graph, state, self._measure(graph)
        return self._measured[2]

    def _measure(self, graph: Groups) -> Mapping[str, Tensor]:
        if self._adversarial is None or self._score == "l2":
            return l2(self._model, graph)
        measures = {"taylor": taylor, "fisher": fisher, "reconstruction": reconstruction}
        return measures[self._score](self._model, graph, self._adversarial)


def sum_by_unit(slot: Slot, values: Tensor, units: int) -> Tensor:
    """Sum a parameter-shaped tensor over everything but a slot's channels, by unit.

    Returns float64 [units] on the CPU: sums of rows on the output side, of columns on the input
    side.
    """
    sums = values.movedim(slot.dim, 0).reshape(values.shape[slot.dim], -1).sum(1).double().cpu()
    return torch.zeros(units, dtype=torch.float64).index_add_(0, slot.units, sums[slot.indices])


def l2(model: nn.Module, graph: Groups) -> dict[str, Tensor]:
    """Return by group [units]: the norm of all weights that go with a unit, in and out.

    The group version of Li et al., "Pruning filters for efficient convnets", ICLR 2017.
    """
    tensors = dict(network_of(model).named_parameters())
    scores = {}
    for group in graph.groups:
        total = torch.zeros(group.units, dtype=torch.float64)
        for slot in graph.slots(group.name):
            if slot.role != "along":
                total += sum_by_unit(slot, tensors[slot.tensor].detach().square(), group.units)
        scores[group.name] = total.sqrt()
    return scores


@torch.enable_grad()
def taylor(model: nn.Module, graph: Groups, adversarial: AdversarialSet) -> dict[str, Tensor]:
    """Return by group [units]: mean over batches of the squared first-order loss change.

    Removing a unit zeroes the columns that read it, which changes the loss by -sum(w * dL/dw)
    over those columns to first order; that is the derivative of a gate on the channel. The
    channels of an attention's queries have no such columns: their gate sits on the rows.
    Source: Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019,
    Eq. 8 with gates; ours: adversarial batches, and all readers of a group together.
    """
    tensors = dict(network_of(model).named_parameters())
    scores = {g.name: torch.zeros(g.units, dtype=torch.float64) for g in graph.groups}
    gates = {
        group.name: [
            *(slot for slot in graph.slots(group.name) if slot.role == "in"),
            *graph.gates(group.name),
        ]
        for group in graph.groups
    }
    names = list(dict.fromkeys(slot.tensor for group in gates.values() for slot in group))
    weights = [tensors[name] for name in names]
    with evaluating(model), requires_grad(model, False):
        for weight in weights:
            weight.requires_grad_(True)
        for images, labels in adversarial.batches():
            loss = F.cross_entropy(model(images), labels)
            gradients = dict(
                zip(names, torch.autograd.grad(loss, weights, allow_unused=True), strict=True)
            )
            products = {
                name: weight.detach() * gradient
                for name, weight in zip(names, weights, strict=True)
                if (gradient := gradients[name]) is not None
            }
            share = len(images) / len(adversarial)
            for name, slots in gates.items():
                change = torch.zeros_like(scores[name])
                for slot in slots:
                    if slot.tensor in products:
                        change += sum_by_unit(slot, products[slot.tensor], len(change))
                scores[name] += share * change.square()
    return scores


@torch.enable_grad()
def fisher(model: nn.Module, graph: Groups, adversarial: AdversarialSet) -> dict[str, Tensor]:
    """Return by group [units]: half the mean over images of the squared first-order change.

    At a minimum of the loss the change of second order counts, and the diagonal of its Hessian
    along gates on the channels is estimated by the empirical Fisher information: the squared
    derivative of each image's own loss, which is sum(x * dL/dx) over what the readers read.
    Source: LeCun et al., "Optimal brain damage", NeurIPS 1989; Theis et al., "Faster gaze
    prediction with dense networks and Fisher pruning", 2018, arXiv 1801.05787, Eq. 7; ours:
    adversarial images, and all readers of a group together. Groups whose readers read nothing of a
    single image (queries, tables of positions) get the score of `taylor`.
    """
    net = network_of(model)
    readers = {
        group.name: [s for s in graph.slots(group.name) if s.role == "in"] for group in graph.groups
    }
    modules = {s.layer: net.get_submodule(s.layer) for slots in readers.values() for s in slots}
    scores = {g.name: torch.zeros(g.units, dtype=torch.float64) for g in graph.groups}
    read: list[tuple[str, Tensor]] = []
    seen: set[str] = set()

    def look(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = (args[0] if args else next(iter(kwargs.values()))).clone()
            x = x if x.requires_grad else x.requires_grad_(True)
            read.append((name, x))  # a tensor of its own: other readers' gradients stay apart
            return ((x, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): x})

        return hook

    handles = [
        m.register_forward_pre_hook(look(name), with_kwargs=True) for name, m in modules.items()
    ]
    try:
        with evaluating(model), requires_grad(model, False):
            for images, labels in adversarial.batches():
                read.clear()
                loss = F.cross_entropy(model(images), labels, reduction="sum")
                gradients = torch.autograd.grad(loss, [x for _, x in read], allow_unused=True)
                changes: dict[str, Tensor] = {}
                for (name, x), gradient in zip(read, gradients, strict=True):
                    if gradient is not None and len(x) % len(images) == 0:
                        by_image = _by_image(modules[name], x.detach() * gradient, len(images))
                        changes[name] = changes.get(name, 0) + by_image
                seen |= set(changes)
                for name, slots in readers.items():
                    change = torch.zeros(len(images), len(scores[name]), dtype=torch.float64)
                    for slot in slots:
                        if slot.layer in changes:
                            entries = changes[slot.layer][:, slot.indices]
                            change.index_add_(1, slot.units, entries)
                    scores[name] += 0.5 * change.square().sum(0) / len(adversarial)
    finally:
        for handle in handles:
            handle.remove()
    blind = [n for n, slots in readers.items() if not seen.intersection(s.layer for s in slots)]
    if blind:
        first_order = taylor(model, graph, adversarial)
        scores |= {name: first_order[name] for name in blind}
    return scores


def _by_image(layer: nn.Module, products: Tensor, n: int) -> Tensor:
    """Sum over all but images and the weight's input channels: float64 [n, channels], CPU."""
    dim = 1 if isinstance(layer, _ConvNd) else products.ndim - 1
    summed = products.movedim(dim, -1).reshape(n, -1, products.shape[dim]).sum(1)
    blocks = layer.groups if isinstance(layer, _ConvNd) else 1  # they read with the same columns
    return summed.view(n, blocks, -1).sum(1).double().cpu()


@torch.no_grad()
def reconstruction(
    model: nn.Module, graph: Groups, adversarial: AdversarialSet
) -> dict[str, Tensor]:
    """Return by group [units]: the share of its readers' outputs lost for good when it goes.

    Removing the inputs b of a unit, while the weights of all others adapt by least squares, adds
    trace(W_b [(A^-1)_bb]^-1 W_b^T) to the squared error of a reader with inputs of second moment
    A; here relative to the energy of its outputs, summed over readers.
    Source: Hassibi and Stork, "Optimal brain surgeon", NeurIPS 1992, for blocks of inputs, with
    the layer's own least-squares Hessian; ours: adversarial images.
    """
    moments = dense_moments(model, adversarial.images, grams=True)
    tensors = {name: p.detach() for name, p in network_of(model).named_parameters()}
    plain = l2(model, graph)
    inverses: dict[str, Tensor] = {}
    scores = {}
    for group in graph.groups:
        total = torch.zeros(group.units, dtype=torch.float64)
        slots = [s for s in graph.slots(group.name) if s.role == "in" and s.layer in moments]
        for slot in slots:
            gram = moments[slot.layer].gram.double().cpu()
            weight = tensors[slot.tensor].flatten(1).double().cpu()
            if slot.layer not in inverses:
                damping = DAMPING * gram.diagonal().mean() + 1e-30
                inverses[slot.layer] = torch.linalg.inv(gram + damping * torch.eye(len(gram)))
            size = tensors[slot.tensor][0, 0].numel()
            blocks = slot.indices[:, None] * size + torch.arange(size)
            inverse = inverses[slot.layer][blocks[:, :, None], blocks[:, None, :]]
            own = weight[:, blocks].permute(1, 2, 0)  # [channels, kernel, out]
            lost = (own * torch.linalg.solve(inverse, own)).sum((1, 2))
            energy = ((weight @ gram) * weight).sum().clamp(min=1e-30)
            total.index_add_(0, slot.units, lost / energy)
        scores[group.name] = total if slots else plain[group.name]
    return scores
