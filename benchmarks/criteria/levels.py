"""The three sizes of the comparison: minutes, hours on a CPU, and the paper's on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm
from torch import nn

from benchmarks.criteria.networks import (
    Network,
    narrow_resnet,
    narrow_vgg,
    small_mobilevit,
)
from benchmarks.criteria.peers import PEERS
from benchmarks.criteria.protocol import ARMS, BEST, PLAIN, WITHOUT_FIT, Stage, Tuning
from robust_prune.types import ThreatModel

MAIN = (BEST, "uniform-l2")
LITTLE = Tuning(epochs=1, images=2000)
FULL = Tuning(epochs=5, amp=True)
FIRST = ("dense", *(peer.name for peer in PEERS), BEST)  # what finalists are chosen from
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Level:
    """Networks, data and stages. `data` None is the folder that the command names by --data."""

    networks: tuple[Network, ...]
    data: tuple[str | None, ...]
    size: tuple[int, int, int] | None
    threat: ThreatModel
    stages: tuple[Stage, ...]
    calibration_images: int = 512
    batch_size: int = 128
    estimator_images: int = 256


def _timm(name: str, *, small_stem: bool) -> Callable[[int], nn.Module]:
    def build(classes: int) -> nn.Module:
        from robust_prune.models import build_model, resolve_spec

        return build_model(resolve_spec(name, {"num_classes": classes}, cifar_stem=small_stem)).net

    assert timm.is_model(name)
    return build


_LONG = {"method": "pgd-at", "attack_steps": 10, "epochs": 110, "lr": 0.1, "amp": True}

SMOKE = Level(
    networks=(
        Network(
            "resnet10-narrow",
            partial(narrow_resnet, width=16, in_chans=1),
            {
                "method": "pgd-at",
                "attack_steps": 3,
                "epochs": 8,
                "clean_epochs": 3,
                "batch_size": 32,
            },
            mean=(0.3,),
            std=(0.35,),
        ),
    ),
    data=("digits",),
    size=(1, 16, 16),
    threat=ThreatModel.linf("0.1"),
    stages=(
        Stage(
            "screen",
            (0.75,),
            (0,),
            (*(arm for arm in ARMS if arm not in PLAIN), BEST + WITHOUT_FIT),
            n=100,
        ),
        Stage("untuned", (0.75,), (0, 1), ("dense", *MAIN), n=300, finalists=1, judged_by="screen"),
        Stage(
            "full",
            (0.75,),
            (0,),
            ("dense", BEST),
            n=300,
            tuning=Tuning(epochs=1),  # the matrix has AutoAttack, a minute a model
            finalists=1,
            judged_by="untuned",
        ),
    ),
    calibration_images=64,
    batch_size=32,
    estimator_images=32,
)

CPU = Level(
    networks=(
        Network(
            "resnet10",
            narrow_resnet,
            {"method": "pgd-at", "attack_steps": 2, "epochs": 14, "lr": 0.05, "amp": True},
            warm="cifar10-resnet10-wide-warm.pt",
        ),
        Network(
            "vgg13",
            narrow_vgg,
            {
                "method": "pgd-at",
                "attack_steps": 2,
                "epochs": 16,
                "clean_epochs": 2,
                "lr": 0.05,
                "amp": True,
            },
        ),
        Network(
            "mobilevit",
            small_mobilevit,
            {"method": "pgd-at", "attack_steps": 2, "epochs": 18, "clean_epochs": 3, "lr": 0.05},
        ),
    ),
    data=(None,),
    size=(3, 32, 32),
    threat=ThreatModel.linf("8/255"),
    stages=(
        Stage("screen", (0.75, 0.5), (0,), FIRST, n=500),
        Stage("untuned", (0.75,), SEEDS, ("dense", BEST), 5000, finalists=2, judged_by="screen"),
        Stage("little", (0.75,), SEEDS, (BEST,), 5000, LITTLE, finalists=1, judged_by="untuned"),
        Stage("full", (0.75,), (0,), (BEST,), 5000, FULL, 100, 1, "untuned"),
        Stage("untuned", (0.5,), SEEDS, (BEST,), 5000, finalists=2, judged_by="screen"),
        Stage("little", (0.5,), SEEDS, (BEST,), 5000, LITTLE, finalists=1, judged_by="untuned"),
        Stage("full", (0.75,), SEEDS, ("dense", BEST), 5000, FULL, 100, 1, "untuned"),
        Stage("screen", (0.75, 0.5), (0,), ARMS, n=500),
        Stage("screen", (0.25,), (0,), ARMS, n=500),
    ),
    calibration_images=256,
    estimator_images=64,
)

GPU = Level(
    networks=(
        Network("resnet18", _timm("resnet18", small_stem=True), _LONG),
        Network("vgg16", partial(narrow_vgg, width=64, layers=(2, 2, 3, 3, 3)), _LONG),
        Network("mobilevit_s", _timm("mobilevit_s", small_stem=True), {**_LONG, "lr": 0.05}),
    ),
    data=("cifar10", "cifar100", "svhn", "tiny-imagenet-200"),
    size=None,
    threat=ThreatModel.linf("8/255"),
    stages=(
        Stage("screen", (0.25, 0.5, 0.75), (0,), ARMS, n=5000),
        Stage(
            "untuned",
            (0.25, 0.5, 0.75),
            SEEDS,
            ("dense", *MAIN),
            n=10_000,
            finalists=2,
            judged_by="screen",
        ),
        Stage(
            "little",
            (0.5, 0.75),
            SEEDS,
            MAIN,
            n=10_000,
            tuning=Tuning(epochs=1, images=2000, steps=10),
            finalists=2,
            judged_by="screen",
        ),
        Stage(
            "full",
            (0.25, 0.5, 0.75),
            SEEDS,
            ("dense", *MAIN),
            n=10_000,
            tuning=Tuning(epochs=20, steps=10, lr=0.05, amp=True),
            autoattack=10_000,
            finalists=2,
            judged_by="untuned",
        ),
    ),
)

LEVELS = {"smoke": SMOKE, "cpu": CPU, "gpu": GPU}
