"""A running average of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of parameters and buffers.

    The decay rises with the steps, min(decay, (1 + t) / (10 + t)), so that the start is forgotten.
    Counters are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: t.detach().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after a step, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.state[name].lerp_(tensor, 1 - decay)
            else:
                self.state[name].copy_(tensor)

    @contextlib.contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Put the average into the model, and its own weights back afterwards."""
        own = cloned(model.state_dict())
        model.load_state_dict(self.state)
        try:
            yield
        finally:
            model.load_state_dict(own)


def cloned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of a state that later steps leave alone."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}
