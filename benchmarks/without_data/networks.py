"""The networks that stand-ins are tried on: with and without batch norm, grey, at 32 and 64 px."""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.criteria.networks import Network, narrow_resnet
from robust_prune.types import ThreatModel

FAST = {"method": "n-fgsm", "attack_steps": 1, "validation_images": 256}


@dataclass(frozen=True)
class Subject:
    """A network with the images it is robust on.

    `data` is a name for `open_data`, or a folder below the one that holds all image folders.
    """

    network: Network
    data: str
    size: tuple[int, int, int]
    threat: ThreatModel


class Block(nn.Module):
    """A residual block of two convolutions, without any normalisation."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, out, 3, stride, 1)
        self.second = nn.Conv2d(out, out, 3, 1, 1)
        self.skip = nn.Conv2d(width, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.second(F.relu(self.first(x)))
        return F.relu(inner + self.skip(x))


def plain_residual(classes: int, *, width: int = 8) -> nn.Module:
    """A small residual network whose only normalisation is that of its input."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1),
        nn.ReLU(),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        Block(4 * width, 4 * width, 1),
        nn.Flatten(),
        nn.Linear(4 * width * 64, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )


def lenet(classes: int) -> nn.Module:
    """Two convolutions and two linear layers on grey images of 28x28."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 49, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def conv_digits(classes: int) -> nn.Module:
    """Three convolutions with batch norm on grey images of 16x16."""

    def block(width: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16),
        nn.MaxPool2d(2),
        *block(16, 32),
        nn.MaxPool2d(2),
        *block(32, 32),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, classes),
    )


def mobilevit(classes: int) -> nn.Module:
    """MobileViT xxs as it is, for images of 64x64 and more."""
    net: nn.Module = timm.create_model("mobilevit_xxs", num_classes=classes)
    return net


def shared_resnet(classes: int) -> nn.Module:
    """A ResNet-10 with 16 to 128 channels."""
    return narrow_resnet(classes, width=16)


CIFAR, TINY = (3, 32, 32), (3, 64, 64)
SUBJECTS = {
    "resnet10": Subject(
        Network(
            "resnet10",
            shared_resnet,
            {},
            warm="cifar10-resnet10-robust.pt",
        ),
        "cifar10",
        CIFAR,
        ThreatModel.linf("8/255"),
    ),
    "plain": Subject(
        Network("plain", plain_residual, {**FAST, "epochs": 8, "lr": 0.05}),
        "cifar10",
        CIFAR,
        ThreatModel.linf("2/255"),
    ),
    "lenet": Subject(
        Network(
            "lenet",
            lenet,
            {
                "method": "pgd-at",
                "epochs": 16,
                "lr": 0.02,
                "batch_size": 32,
                "attack_steps": 3,
                "eps_warmup": 5,
            },
            mean=(0.0,),
            std=(1.0,),
        ),
        "digits",
        (1, 28, 28),
        ThreatModel.linf("0.15"),
    ),
    "conv-digits": Subject(
        Network(
            "conv-digits",
            conv_digits,
            {"method": "pgd-at", "epochs": 6, "attack_steps": 3, "batch_size": 32, "lr": 0.1},
            mean=(0.0,),
            std=(1.0,),
        ),
        "digits",
        (1, 16, 16),
        ThreatModel.linf("0.1"),
    ),
    "mobilevit": Subject(
        Network("mobilevit", mobilevit, {**FAST, "epochs": 6, "lr": 0.1}),
        "tiny-imagenet-20",
        TINY,
        ThreatModel.linf("2/255"),
    ),
}
