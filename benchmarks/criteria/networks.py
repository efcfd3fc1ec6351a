"""The dense networks that are compared on, and how the suite trains them robustly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torchvision.models import vgg

from robust_prune.modules import ImageModel, seeded
from robust_prune.types import ModelSpec, ThreatModel

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


@dataclass(frozen=True)
class Network:
    """A dense network: how it is built, and how the suite trains it.

    `warm` names weights to start from where the file is there; `training` overrides settings of
    `TrainingConfig`; `threat` is the network's own where its data's is not what it can hold.
    """

    name: str
    build: Callable[[int], nn.Module]
    training: dict[str, Any]
    warm: str = ""
    mean: tuple[float, ...] = CIFAR_MEAN
    std: tuple[float, ...] = CIFAR_STD
    threat: ThreatModel | None = None

    def create(self, classes: int, size: tuple[int, int, int], seed: int = 0) -> ImageModel:
        """Return the network with random weights."""
        with seeded(seed):
            net = self.build(classes)
        spec = ModelSpec(
            source="custom",
            arch=self.name,
            kwargs={},
            num_classes=classes,
            mean=self.mean,
            std=self.std,
            input_size=size,
        )
        return ImageModel(net, spec)

    def start(
        self, classes: int, size: tuple[int, int, int], warm: Path | None, seed: int
    ) -> tuple[ImageModel, str]:
        """Return the network as its training starts, and from what: warm weights if `warm` has."""
        model = self.create(classes, size, seed)
        path = warm / self.warm if warm and self.warm else None
        if path is None or not path.exists():
            return model, "random weights"
        model.net.load_state_dict(torch.load(path, weights_only=True))
        return model, self.warm


def narrow_resnet(classes: int, *, width: int = 32, in_chans: int = 3) -> nn.Module:
    """A ResNet for small images with one block a stage, `width` to 8 * `width` channels wide."""
    net: Any = timm.create_model(
        "resnet18",
        num_classes=classes,
        in_chans=in_chans,
        layers=[1, 1, 1, 1],
        channels=tuple(width * 2**i for i in range(4)),
        stem_type="deep",
        stem_width=width // 2,
    )
    net.conv1[0].stride = (1, 1)
    net.maxpool = nn.Identity()
    return net  # type: ignore[no-any-return]


def narrow_vgg(
    classes: int, *, width: int = 32, layers: Sequence[int] = (2, 2, 2, 2, 2)
) -> nn.Module:
    """VGG with batch norm for small images, `width` channels at first; by default VGG-13's layers.

    One linear layer classifies, as usual on images of 32x32.
    """
    sizes = [width * 2**i for i in (0, 1, 2, 3, 3)]
    plan: list[str | int] = []
    for size, count in zip(sizes, layers, strict=True):
        plan += [*[size] * count, "M"]
    net: Any = vgg.VGG(vgg.make_layers(plan[:-1], batch_norm=True), num_classes=classes)
    net.avgpool = nn.AdaptiveAvgPool2d(1)
    net.classifier = nn.Linear(sizes[-1], classes)
    return net  # type: ignore[no-any-return]


def small_mobilevit(classes: int) -> nn.Module:
    """MobileViT xxs with a stem of stride 1, for small images."""
    net: Any = timm.create_model("mobilevit_xxs", num_classes=classes)
    net.stem.conv.stride = (1, 1)
    return net  # type: ignore[no-any-return]
