"""AWP: any method, with its loss taken where the weights are disturbed too."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robust_prune.adversaries import Loss
from robust_prune.errors import UsageError
from robust_prune.finetune.attack import Attack, Method

GAMMA = 5e-3


def awp(method: Callable[..., Tensor], *, gamma: float = GAMMA) -> Method:
    """Return the method with its loss at w + v, where v raises the loss at w.

    Every parameter w with two or more dimensions that is trained gets
    `v = gamma * ||w|| * g / ||g||`, with g the gradient of the method's loss at w on the images
    that its attack found there. The loss is then taken anew at w + v on the same images, and its
    gradient is the one for w. The model is not written to; batch norms count the second pass only.

    The method sees stand-ins for the model, which it may call and put into modes, but whose
    layers it can't reach by name. Attacks beyond those of the first pass go against w + v; what
    the method draws without its attack, such as dropout, differs between the passes.

    Args:
        method: (model, images, labels, attack) -> loss; further keywords are handed on.
        gamma: size of v relative to w, positive.

    Raises:
        UsageError: gamma is not positive.

    Source: Wu, Xia and Wang, "Adversarial weight perturbation helps robust generalization",
    NeurIPS 2020, arXiv 2004.05884, with one step of v; gamma 5e-3 as the authors' script for
    TRADES, 1e-2 is common with plain adversarial training. Deviations from that script: weight
    decay sees w, there w + v; weights are disturbed from the first epoch on, there from the tenth.
    """
    if not gamma > 0:
        raise UsageError(f"AWP's gamma {gamma:g} must be positive; 0.005 is usual")

    @functools.wraps(method)
    def disturbed(
        model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, **keywords: Any
    ) -> Tensor:
        weights = {n: p for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1}
        if not weights:
            return method(model, images, labels, attack, **keywords)
        recording = _Recording(**_settings(attack))
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        loss = method(_StandIn(model, {}, buffers), images, labels, recording, **keywords)
        disturbance = _disturbance(loss, weights, gamma)
        replaying = _Replaying(**_settings(attack), left=recording.found)
        return method(_StandIn(model, disturbance, {}), images, labels, replaying, **keywords)

    disturbed.__name__ = f"{getattr(method, '__name__', type(method).__name__)}+awp"
    return disturbed


def _disturbance(loss: Tensor, weights: Mapping[str, Tensor], gamma: float) -> dict[str, Tensor]:
    """Return v of every weight that the loss depends on, detached."""
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    found = {}
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        if gradient is not None:
            tiny = torch.finfo(gradient.dtype).tiny  # keeps 0 / 0 out, changes nothing else
            length = torch.linalg.vector_norm(gradient) + tiny
            size = gamma * torch.linalg.vector_norm(weight.detach())
            found[name] = size * (gradient / length)
    return found


class _StandIn(nn.Module):
    """The model with a disturbance added to its weights, and buffers of its own."""

    def __init__(
        self, model: nn.Module, disturbance: dict[str, Tensor], buffers: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._disturbance = disturbance
        self._own_buffers = buffers

    def forward(self, *args: Any, **keywords: Any) -> Any:
        parameters = dict(self.model.named_parameters())
        # summed at every call, so that inside requires_grad(model, False) it needs no gradient;
        # the weight comes first, so that the sum has its memory layout
        moved = {name: parameters[name] + v for name, v in self._disturbance.items()}
        return functional_call(self.model, {**moved, **self._own_buffers}, args, keywords)


@dataclass(frozen=True)
class _Recording(Attack):
    """Attacks the model behind its stand-in, and remembers the images."""

    found: list[Tensor] = field(default_factory=list)

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, loss: Loss | None = None
    ) -> Tensor:
        self.found.append(super().__call__(model, images, labels, loss))
        return self.found[-1]

    def single_step(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        self.found.append(super().single_step(model, images, labels))
        return self.found[-1]

    @contextlib.contextmanager
    def seen_by(self, model: nn.Module) -> Iterator[nn.Module]:
        # weights are not disturbed yet: the model itself is the same function, and may be folded
        behind = model.model if isinstance(model, _StandIn) else model
        with super().seen_by(behind) as seen:
            yield seen


@dataclass(frozen=True)
class _Replaying(Attack):
    """Gives the images of a recording, in order, and attacks where there are none left."""

    left: list[Tensor] = field(default_factory=list)

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, loss: Loss | None = None
    ) -> Tensor:
        return self.left.pop(0) if self.left else super().__call__(model, images, labels, loss)

    def single_step(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return self.left.pop(0) if self.left else super().single_step(model, images, labels)


def _settings(attack: Attack) -> dict[str, Any]:
    return {setting.name: getattr(attack, setting.name) for setting in fields(Attack)}
