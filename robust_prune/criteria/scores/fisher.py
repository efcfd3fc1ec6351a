"""The change of the adversarial loss when a channel goes, to second order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from robust_prune.adversaries import AdversarialSet
from robust_prune.criteria.scores.taylor import taylor
from robust_prune.graph import Groups
from robust_prune.modules import as_memory_allows, evaluating, network_of, requires_grad
from robust_prune.registry import channel_score


@channel_score("fisher")
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

    def changes_of(images: Tensor, labels: Tensor, size: int) -> dict[str, Tensor]:
        """By layer [n, channels], what goes with each input channel of an image."""
        parts = zip(torch.split(images, size), torch.split(labels, size), strict=True)
        found = [_changes(model, modules, read, part, target) for part, target in parts]
        return {name: torch.cat([changes[name] for changes in found]) for name in found[0]}

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
                work = functools.partial(changes_of, images, labels)
                changes = as_memory_allows(work, len(images), "gradients")
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


def _changes(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    read: list[tuple[str, Tensor]],
    images: Tensor,
    labels: Tensor,
) -> dict[str, Tensor]:
    """Run a batch, and return what the hooks `read`, times its gradient, by layer and image."""
    read.clear()
    loss = F.cross_entropy(model(images), labels, reduction="sum")
    gradients = torch.autograd.grad(loss, [x for _, x in read], allow_unused=True)
    changes: dict[str, Tensor] = {}
    for (name, x), gradient in zip(read, gradients, strict=True):
        if gradient is not None and len(x) % len(images) == 0:
            by_image = _by_image(modules[name], x.detach() * gradient, len(images))
            changes[name] = changes.get(name, 0) + by_image
    return changes


def _by_image(layer: nn.Module, products: Tensor, n: int) -> Tensor:
    """Sum over all but images and the weight's input channels: float64 [n, channels], CPU."""
    dim = 1 if isinstance(layer, _ConvNd) else products.ndim - 1
    summed = products.movedim(dim, -1).reshape(n, -1, products.shape[dim]).sum(1)
    blocks = layer.groups if isinstance(layer, _ConvNd) else 1  # they read with the same columns
    return summed.view(n, blocks, -1).sum(1).double().cpu()
