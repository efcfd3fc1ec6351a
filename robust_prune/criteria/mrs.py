"""Module robustness sensitivity: how much the adversarial loss rises when weights are disturbed.

MRS is the paper's idea (Bai, Tabia, Santos-Rodriguez, arXiv 2410.15176); the definition used here
is the module robust criticality of Zhu et al. (RiFT, ICCV 2023, arXiv 2308.02533, Def. 3.1), since
the paper's own formula was not available to us:

    MRS_i = max over ||D||_2 <= rho * ||W_i||_2 of L(W with W_i + D; D_adv) - L(W; D_adv)

with L the mean cross-entropy and D_adv a fixed adversarial set made once at the trained weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from robust_prune.adversaries import AdversarialSet, adversarial_loss, gradients_of
from robust_prune.errors import ModelError, UsageError
from robust_prune.graph import weight_of
from robust_prune.modules import evaluating, network_of, requires_grad
from robust_prune.types import (
    ChannelGroup,
    GroupSensitivity,
    ModuleSensitivity,
    Sensitivity,
)

RHO = 0.1


def sensitivities(
    model: nn.Module,
    adversarial: AdversarialSet,
    *,
    method: str = "first-order",
    rho: float = RHO,
    epochs: int = 10,
    groups: tuple[ChannelGroup, ...] = (),
    on_module: Callable[[str], None] | None = None,
) -> Sensitivity:
    """Measure MRS of every convolution and linear layer, and of every channel group.

    Args:
        model: left as it was.
        adversarial: the fixed set.
        method: `first-order` gives all layers from one pass, `ascent` climbs layer by layer;
            `structural` is `curves.structural`.
        rho: radius of the disturbance, relative to the norm of the layer's weights.
        epochs: passes of the ascent over the set, per layer.
        groups: a group takes the largest MRS of the members that lose output channels.
        on_module: called with each layer's name when its ascent is done.

    Returns:
        MRS in nats, by layer and by group, in the model's order.

    Raises:
        ModelError: the adversarial loss or a gradient is not finite.
    """
    if method not in ("first-order", "ascent"):
        raise UsageError(
            f"MRS of layers is estimated by first-order or ascent, not {method!r}; structural MRS "
            "is of channel groups"
        )
    if not 0 < rho < 10:
        raise UsageError(f"rho {rho:g} must lie between 0 and 10; 0.1 is RiFT's")
    start = time.perf_counter()
    layers = weighted_layers(model)
    if method == "first-order":
        loss, values = first_order(model, adversarial, rho=rho)
    else:
        loss, values = ascent(model, adversarial, rho=rho, epochs=epochs, on_module=on_module)
    if not all(math.isfinite(value) for value in (loss, *values.values())):
        raise ModelError(
            f"the adversarial loss is {loss:g} and the MRS of some layer is not finite; "
            "does the model hold NaN or infinite weights?"
        )
    return Sensitivity(
        method=method,
        rho=rho,
        threat=adversarial.threat,
        attack=adversarial.attack,
        n=len(adversarial),
        seed=adversarial.seed,
        adversarial_loss=loss,
        seconds=time.perf_counter() - start,
        modules=tuple(
            ModuleSensitivity(
                name=name,
                kind=type(layer).__name__,
                params=weight_of(layer).numel(),
                weight_norm=float(weight_of(layer).detach().norm()),
                mrs=values[name],
            )
            for name, layer in layers.items()
        ),
        groups=tuple(group_sensitivity(group, values) for group in groups),
    )


def group_sensitivity(group: ChannelGroup, mrs: Mapping[str, float]) -> GroupSensitivity:
    """Return the group's MRS: the largest of its members that lose output channels.

    Of a group without such layers (a parameter of its own) that of its readers counts.
    """
    members = [name for name in group.members if name in mrs]
    members = members or [name for name in group.readers if name in mrs] or list(mrs)
    decided_by = max(members, key=lambda name: mrs[name])
    return GroupSensitivity(group.name, group.width, mrs[decided_by], decided_by)


def weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers by name: the modules that MRS is about."""
    return {
        name: layer
        for name, layer in network_of(model).named_modules()
        if isinstance(layer, (_ConvNd, nn.Linear))
    }


@torch.enable_grad()
def first_order(
    model: nn.Module, adversarial: AdversarialSet, *, rho: float
) -> tuple[float, dict[str, float]]:
    """Return (adversarial loss, MRS by layer) of the linearised problem.

    The maximum of a linear function over a ball is the dual norm: rho * ||W_i|| * ||dL/dW_i||.
    One forward and one backward pass give it for all layers at once. This closed form is ours.
    """
    layers = weighted_layers(model)
    weights = [weight_of(layer) for layer in layers.values()]
    with evaluating(model), requires_grad(model, False):
        for weight in weights:
            weight.requires_grad_(True)
        total, sums = gradients_of(
            *(model, weights, adversarial.images, adversarial.labels, "sum"),
            adversarial.batch_size,
        )
    n = len(adversarial)
    values = {
        name: 0.0 if gradient is None else float(rho * weight.detach().norm() * gradient.norm() / n)
        for name, weight, gradient in zip(layers, weights, sums, strict=True)
    }
    return total / n, values


@torch.enable_grad()
def ascent(
    model: nn.Module,
    adversarial: AdversarialSet,
    *,
    rho: float,
    epochs: int,
    on_module: Callable[[str], None] | None = None,
) -> tuple[float, dict[str, float]]:
    """Return (adversarial loss, MRS by layer) by gradient ascent on one layer at a time.

    Source: RiFT climbs by SGD with learning rate 1 for 10 epochs and projects after each epoch.
    Deviation: steps have the length 2.5 * radius / steps along the normalised gradient, so that
    layers of any scale reach the ball's surface, every step is projected, and the best point
    seen counts.
    """
    values: dict[str, float] = {}
    with evaluating(model), requires_grad(model, False):
        base = adversarial_loss(model, adversarial)
        for name, layer in weighted_layers(model).items():
            values[name] = _climb(model, weight_of(layer), adversarial, base, rho, epochs)
            if on_module is not None:
                on_module(name)
    return base, values


def _climb(
    model: nn.Module,
    weight: nn.Parameter,
    adversarial: AdversarialSet,
    base: float,
    rho: float,
    epochs: int,
) -> float:
    """Return the largest rise of the loss that was seen; NaN where a gradient is not finite."""
    origin = weight.detach().clone()
    radius = rho * float(origin.norm())
    batches = math.ceil(len(adversarial) / adversarial.batch_size)
    step = 2.5 * radius / (epochs * batches)
    best = 0.0
    weight.requires_grad_(True)
    try:
        for _ in range(epochs):
            climbs = False
            for images, labels in adversarial.batches():
                _, (gradient,) = gradients_of(model, [weight], images, labels, "mean")
                norm = 0.0 if gradient is None else float(gradient.norm())
                if not math.isfinite(norm):
                    return math.nan
                if gradient is None or norm == 0:
                    continue
                climbs = True
                with torch.no_grad():
                    moved = weight - origin + step * gradient / gradient.norm()
                    shrink = min(1.0, radius / max(float(moved.norm()), 1e-30))
                    weight.copy_(origin + shrink * moved)
            if not climbs:
                return best
            best = max(best, adversarial_loss(model, adversarial) - base)
    finally:
        with torch.no_grad():
            weight.copy_(origin)
        weight.requires_grad_(False)
    return best
