"""Closed-form models: what an attack or a sensitivity must find is known exactly."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearClassifier(nn.Module):
    """Two classes on flattened images: the decision value is w . x + b, its boundary a plane."""

    def __init__(self, weight: Tensor, bias: float, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.layer = nn.Linear(weight.numel(), 2, dtype=weight.dtype)
        with torch.no_grad():
            self.layer.weight.copy_(torch.stack([-weight / 2, weight / 2]))
            self.layer.bias.copy_(torch.tensor([-bias / 2, bias / 2], dtype=weight.dtype))

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))

    def distance(self, images: Tensor, norm: str) -> Tensor:
        """Distance of each image to the boundary: |w . x + b| over the dual norm of w."""
        logits = self(images)
        weight = self.layer.weight[1] - self.layer.weight[0]
        dual = weight.abs().sum() if norm == "linf" else weight.norm()
        return (logits[:, 1] - logits[:, 0]).abs() / dual


def linear_classifier(dim: int = 12, seed: int = 0) -> LinearClassifier:
    """A random plane through the middle of the unit cube."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(dim, generator=generator, dtype=torch.float64)
    return LinearClassifier(weight, float(-0.5 * weight.sum()), (3, 2, dim // 6))


def near_middle(n: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Images so far from 0 and 1 that the box does not matter."""
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + 0.05 * torch.randn(n, *shape, generator=generator, dtype=torch.float64)


class Saying(nn.Module):
    """Classes that are given, for images in their order from the first."""

    def __init__(self, classes: torch.Tensor) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(self.classes[: len(images)], 10).float()
