"""The module on [0, 1] images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_prune.errors import DataError
from robust_prune.modules.layout import plain_layout
from robust_prune.types import ModelSpec


class ImageModel(nn.Module):
    """A network behind its normalisation: images in [0, 1], [N, C, H, W], give logits [N, K].

    `net` holds all weights, so names of layers and of the state_dict are the network's own.
    `spec` says how to build the network again.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.net = net
        self.spec = spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, K] of images [N, C, H, W] in [0, 1]."""
        if images.shape[1] != self.mean.shape[1]:
            raise DataError(
                f"the model takes images of {self.mean.shape[1]} channels, not {images.shape[1]}"
            )
        logits: Tensor = self.net((plain_layout(images) - self.mean) / self.std)
        return logits


def network_of(model: nn.Module) -> nn.Module:
    """Return the module whose layer names people know: the network inside an ImageModel."""
    return model.net if isinstance(model, ImageModel) else model


def image_channels(model: nn.Module) -> int:
    """Return how many channels the images have: what the first convolution reads, else 3."""
    if isinstance(model, ImageModel):
        return model.mean.shape[1]
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    first = next(convolutions, None)
    return 3 if first is None else first.in_channels
