"""Images made without data."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_prune.data.datasets import (
    Size,
)


def synthetic_images(n: int, size: Size, seed: int) -> Tensor:
    """Return smooth random images [n, C, H, W] in [0, 1] for a model whose data is unknown."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = size
    coarse = torch.rand(n, channels, 8, 8, generator=generator)
    images = torch.nn.functional.interpolate(
        coarse, size=(height, width), mode="bilinear", align_corners=False
    )
    noise = 0.1 * torch.randn(n, channels, height, width, generator=generator)
    return (images + noise).clamp(0, 1)
