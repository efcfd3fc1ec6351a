"""What the matrix holds: data, networks, shares, arms, training methods and seeds, by level."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import timm
from torch import nn

from benchmarks.criteria.networks import Network, narrow_resnet, narrow_vgg
from benchmarks.without_data.networks import plain_residual
from robust_prune.models import build_model, resolve_spec
from robust_prune.types import ThreatModel

DENSE, PAPER, OURS = "dense", "mrs-l2", "curve-l2"
CAPACITY, EVEN = "capacity-l2", "uniform-l2"
SCREEN = ("tp-l2-local", "tp-bn-scale", "tp-group-norm", "tp-taylor-adversarial")
UNTUNED, LITTLE, LONG = "untuned", "little", "long"
Contest = tuple[str, str, str, float]  # data, network, method, share


@dataclass(frozen=True)
class Images:
    """A data set: its name or the folder below --data, and the size that networks take.

    Dense models see few images `passes` times as often as the networks' own epochs say.
    """

    name: str
    size: tuple[int, int, int] | None = None
    threat: ThreatModel = field(default_factory=lambda: ThreatModel.linf("8/255"))
    passes: int = 1


@dataclass(frozen=True)
class Tuning:
    """Fine-tuning, the same for every arm; `images` 0 means all, `epochs` 0 none."""

    name: str
    epochs: int = 0
    images: int = 0
    steps: int = 2
    lr: float = 0.1
    autoattack: int = 0  # test images that AutoAttack takes where a claim rests on it, 0 for none

    def cut(self, n: int) -> Tuning:
        """Return the same on n images with one epoch of one step, and AutoAttack on one image."""
        return replace(
            self,
            epochs=min(1, self.epochs),
            images=min(n, self.images),
            steps=1,
            autoattack=min(1, self.autoattack),
        )


@dataclass(frozen=True)
class Key:
    """What a cell measures: one model. The dense one has share 0."""

    data: str
    network: str
    method: str
    ratio: float
    arm: str
    tuning: str
    seed: int

    @property
    def label(self) -> str:
        """A name for files."""
        share = f"{100 * self.ratio:g}"
        parts = (self.data, self.network, self.method, share, self.arm, self.tuning)
        return "_".join((*(p.replace("/", "-") for p in parts), str(self.seed)))

    def with_arm(self, arm: str) -> Key:
        """The same for another arm; the dense model keeps share 0 and the first seed of its own."""
        return replace(self, arm=arm, ratio=0.0 if arm == DENSE else self.ratio)


@dataclass(frozen=True)
class Level:
    """A matrix: all combinations of its fields.

    `finalists` of torch-pruning's arms, the best of `screened` before fine-tuning with the first
    seed, are tuned; the others are not. AutoAttack takes our better arm, torch-pruning's best and
    the dense model where the first two differ with a p of `claimed` or less.
    """

    data: tuple[Images, ...]
    networks: tuple[Network, ...]
    ratios: tuple[float, ...]
    tunings: tuple[Tuning, ...]
    arms: tuple[str, ...] = (PAPER, EVEN, CAPACITY, OURS)
    screened: tuple[str, ...] = SCREEN
    finalists: int = 2
    methods: tuple[str, ...] = ("pgd-at", "trades")
    seeds: tuple[int, ...] = (0, 1, 2)
    test_images: int = 5000
    calibration_images: int = 256
    batch_size: int = 128
    claimed: float = 0.05
    train_images: int = 0  # of training and of validation; 0 means all

    def cut(self, n: int) -> Level:
        """Return the same matrix on n images, with one epoch of one step: whether it runs."""
        short = {"epochs": 1, "attack_steps": 1, "clean_epochs": 0}
        return replace(
            self,
            data=tuple(replace(d, passes=1) for d in self.data),
            networks=tuple(replace(m, training={**m.training, **short}) for m in self.networks),
            tunings=tuple(t.cut(n) for t in self.tunings),
            test_images=min(n, self.test_images),
            train_images=n,
            calibration_images=min(n, self.calibration_images),
            batch_size=min(n, self.batch_size),
            claimed=1.0,
        )

    def images(self, name: str) -> Images:
        """Return the data set of a name."""
        return next(d for d in self.data if d.name == name)

    def network(self, name: str) -> Network:
        """Return the network of a name."""
        return next(n for n in self.networks if n.name == name)

    def threat(self, key: Key) -> ThreatModel:
        """Return what a cell is attacked with, in training and in the end."""
        return self.network(key.network).threat or self.images(key.data).threat

    def tuning(self, name: str) -> Tuning:
        """Return the fine-tuning of a name."""
        return next(t for t in self.tunings if t.name == name)

    def screens(self) -> Iterator[Key]:
        """Yield what finalists are chosen by: torch-pruning's arms, not tuned, the first seed."""
        for data, network, method, ratio in self.blocks():
            for arm in self.screened:
                yield Key(data, network, method, ratio, arm, UNTUNED, self.seeds[0])

    def cells(self, finalists: Mapping[Contest, Sequence[str]]) -> Iterator[Key]:
        """Yield all cells, seed by seed: a matrix cut short has all arms of the seeds it has."""
        for seed, (data, network, method, ratio) in itertools.product(self.seeds, self.blocks()):
            arms = (*self.arms, *finalists.get((data, network, method, ratio), ()))
            for tuning, arm in itertools.product(self.tunings, (DENSE, *arms)):
                if arm == DENSE and tuning.name == UNTUNED and seed != self.seeds[0]:
                    continue  # it is the same model
                yield Key(data, network, method, ratio, arm, tuning.name, seed).with_arm(arm)

    def blocks(self) -> Iterator[Contest]:
        """Yield (data, network, method, share)."""
        for data, network, method in itertools.product(self.data, self.networks, self.methods):
            for ratio in self.ratios:
                yield data.name, network.name, method, ratio


def _timm(name: str, classes: int) -> nn.Module:
    return build_model(resolve_spec(name, {"num_classes": classes}, cifar_stem=True)).net


def _published(name: str, classes: int) -> nn.Module:
    """The stem keeps its stride of 2: on 32x32 images a quarter of the work of a stride of 1."""
    net: nn.Module = timm.create_model(name, num_classes=classes)
    return net


_FLAT = {"schedule": "constant", "ema": 0.999, "lr": 0.1, "amp": True, "attack_steps": 2}
_WARM = {**_FLAT, "clean_epochs": 2}
_LONG = {"schedule": "constant", "ema": 0.999, "lr": 0.1, "amp": True, "attack_steps": 10}
_PAPERS = (
    Network("resnet18", partial(_timm, "resnet18"), {**_LONG, "epochs": 110}),
    Network(
        "vgg16",
        partial(narrow_vgg, width=64, layers=(2, 2, 3, 3, 3)),
        {**_LONG, "epochs": 110, "lr": 0.05},
    ),
    Network("mobilevit_s", partial(_timm, "mobilevit_s"), {**_LONG, "epochs": 110, "lr": 0.05}),
    Network(
        "mobilevitv2_100", partial(_timm, "mobilevitv2_100"), {**_LONG, "epochs": 110, "lr": 0.05}
    ),
)
_DIGITS = {"method": "pgd-at", "attack_steps": 3, "epochs": 8, "clean_epochs": 3, "batch_size": 32}
_NARROW = Network(
    "resnet10-narrow",
    partial(narrow_resnet, width=16, in_chans=1),
    _DIGITS,
    mean=(0.3,),
    std=(0.35,),
)
_EPS = ThreatModel.linf("8/255")

SMOKE = Level(
    data=(Images("digits", (1, 16, 16), ThreatModel.linf("0.1")),),
    networks=(_NARROW,),
    ratios=(0.75,),
    tunings=(Tuning(UNTUNED), Tuning(LONG, 1, steps=2, lr=0.05, autoattack=10)),
    arms=(OURS,),
    screened=("tp-l2-local", "tp-bn-scale"),
    finalists=1,
    methods=("pgd-at",),
    seeds=(0,),
    test_images=200,
    calibration_images=64,
    batch_size=32,
    claimed=1.0,
)
CPU = Level(
    data=tuple(
        Images(name, (3, 32, 32), _EPS, passes)
        for name, passes in (("cifar10", 1), ("cifar100", 4), ("tiny-imagenet-20", 2))
    ),
    networks=(
        Network("resnet10", partial(narrow_resnet, width=16), {**_FLAT, "epochs": 12}),
        Network("vgg13", partial(narrow_vgg, width=16), {**_WARM, "epochs": 16, "lr": 0.05}),
        *(
            Network(name, partial(_published, arch), {**_WARM, "epochs": 16, "lr": 0.05})
            for name, arch in (("mobilevit", "mobilevit_xxs"), ("mobilevit2", "mobilevitv2_050"))
        ),
        Network(
            "plain",
            plain_residual,
            {**_FLAT, "epochs": 40, "lr": 0.05},
            threat=ThreatModel.linf("2/255"),
        ),
    ),
    ratios=(0.5, 0.75, 0.9),
    tunings=(
        Tuning(UNTUNED, autoattack=1000),
        Tuning(LITTLE, 1, images=2000, lr=0.02),
        Tuning(LONG, 12, autoattack=1000),
    ),
)
GPU = Level(
    data=(*(Images(n, None, _EPS) for n in ("cifar10", "cifar100", "svhn", "tiny-imagenet-200")),),
    networks=_PAPERS,
    ratios=(0.5, 0.75, 0.9),
    tunings=(
        Tuning(UNTUNED, autoattack=10_000),
        Tuning(LITTLE, 1, images=2000, lr=0.02),
        Tuning(LONG, 60, steps=10, autoattack=10_000),
    ),
    test_images=10_000,
    calibration_images=512,
    claimed=1.0,
)
LEVELS = {"smoke": SMOKE, "cpu": CPU, "gpu": GPU}
