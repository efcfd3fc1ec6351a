"""Whole residual blocks against channels everywhere, at equal time.

    python -m benchmarks.blocks --data DIR --out benchmarks/records/<date>_blocks

A narrow ResNet-18 for CIFAR-10 at 8/255, trained by the recipe of the matrix. Of its eight blocks
four have a skip that is the identity: their branches can go whole. What an empty branch adds is a
constant for each channel; it is fitted, as the layers behind it are, to the dense model's
activations. Beside it stands the model that `compress` makes and that takes the same time, both
without fine-tuning and after the same one. `--cache` keeps the dense model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.criteria.dense import CACHE, dense_model, where_native
from benchmarks.criteria.networks import Network
from benchmarks.criteria.protocol import verdicts
from benchmarks.equal_time import Bench, as_fast
from robust_prune.adversaries import adversarial_set
from robust_prune.criteria import calibration_images
from robust_prune.data import DataSplits, open_data
from robust_prune.finetune import TrainingConfig, train_
from robust_prune.graph import count_cost
from robust_prune.models import library_versions
from robust_prune.modules import ImageModel, copied, evaluating, network_of, watching
from robust_prune.pipeline import hardware
from robust_prune.repair import Reconstruction
from robust_prune.statistics import PairedTest
from robust_prune.types import ThreatModel

THREAT = ThreatModel.linf("8/255")
RECIPE = {
    "method": "pgd-at",
    "schedule": "constant",
    "ema": 0.999,
    "lr": 0.1,
    "amp": True,
    "attack_steps": 2,
}
WHOLE = ("layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1")
IMAGES = 512


class Emptied(nn.Module):
    """A residual block without its branch: the activation of the stream and a constant [C]."""

    def __init__(self, constant: Tensor) -> None:
        super().__init__()
        self.constant = nn.Parameter(constant.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, C, H, W] of the same."""
        return torch.relu(x + self.constant)


def narrow_resnet18(classes: int) -> nn.Module:
    """A ResNet-18 for small images, a quarter as wide."""
    net: Any = timm.create_model(
        "resnet18", num_classes=classes, channels=(16, 32, 64, 128), stem_type="deep", stem_width=8
    )
    net.conv1[0].stride = (1, 1)
    net.maxpool = nn.Identity()
    return net  # type: ignore[no-any-return]


def emptied(model: ImageModel, blocks: Sequence[str], images: Tensor) -> ImageModel:
    """Return a copy in which blocks have no branch, fitted to the model's own activations.

    Args:
        model: the dense one.
        blocks: by name in the network; their skips are the identity.
        images: [N, 3, H, W], adversarial and clean ones.
    """
    found = copied(model)
    assert isinstance(found, ImageModel)
    constants: dict[str, Tensor] = {}

    def look(name: str, _: nn.Module, x: Tensor, y: Tensor) -> None:
        constants[name] = y.mean((0, 2, 3))  # what the last batch norm of the branch gives

    ends = {f"{block}.bn2": network_of(model).get_submodule(f"{block}.bn2") for block in blocks}
    with torch.no_grad(), evaluating(model), watching(ends, after=look):
        model(images)
    for block in blocks:
        stage, _, index = block.rpartition(".")
        parent: Any = network_of(found).get_submodule(stage)
        parent[int(index)] = Emptied(constants[f"{block}.bn2"])
    Reconstruction.of(model, images).apply_(found, {})
    return found


def tuned(model: ImageModel, splits: DataSplits, epochs: int, seed: int) -> ImageModel:
    """Fine-tune a copy as the matrix does."""
    found = copied(model)
    assert isinstance(found, ImageModel)
    assert splits.validation is not None
    config = TrainingConfig(threat=THREAT, epochs=epochs, seed=seed, batch_size=128, **RECIPE)
    train_(found, splits.train, splits.validation, where_native(config, "cpu"))
    return found


def measured(model: ImageModel, bench: Bench, asked: argparse.Namespace) -> dict[str, Any]:
    """Attack a model without fine-tuning and after it."""
    splits = bench.splits
    after = tuned(model, splits, asked.epochs, 0)
    return {
        "macs": count_cost(model, bench.size).macs,
        "params": sum(p.numel() for p in model.parameters()),
        "untuned": verdicts(model, splits.test, asked.n, THREAT, "pgd"),
        "tuned": verdicts(after, splits.test, asked.n, THREAT, "pgd"),
    }


def row(bench: Bench, blocks: Sequence[str], images: Tensor, asked: Any) -> dict[str, Any]:
    """Empty some blocks, make the plan as fast as that, and measure both."""
    whole = emptied(bench.dense, blocks, images)  # type: ignore[arg-type]
    dense = count_cost(bench.dense, bench.size).macs
    counted, tried = as_fast(bench, whole, 1 - count_cost(whole, bench.size).macs / dense)
    shares = dict(zip(("blocks", "channels"), bench.shares(whole, counted.model), strict=True))
    arms = {"blocks": measured(whole, bench, asked)}
    arms["channels"] = measured(counted.model, bench, asked)
    tests = {
        stage: asdict(_paired(arms["channels"][stage]["pgd"], arms["blocks"][stage]["pgd"]))
        for stage in ("untuned", "tuned")
    }
    return {"blocks": blocks, "time_left": shares, "tried": tried, "arms": arms, "paired": tests}


def _paired(first: str, second: str) -> PairedTest:
    pairs = list(zip(first, second, strict=True))
    return PairedTest(
        sum(a > b for a, b in pairs),
        sum(b > a for a, b in pairs),
    )


def said(found: dict[str, Any]) -> str:
    """Return a row of the table: shares of time and of multiply-adds, PGD-20 in percent."""

    def percent(arm: str, stage: str) -> str:
        right = found["arms"][arm][stage]["pgd"]
        return f"{100 * right.count('1') / len(right):.1f}"

    cells = [" ".join(found["blocks"])]
    cells += [f"{found['time_left'][arm]:.2f}" for arm in ("blocks", "channels")]
    for stage in ("untuned", "tuned"):
        test = PairedTest(**found["paired"][stage])
        cells += [percent("blocks", stage), percent("channels", stage), f"{test.p_value:.2g}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--batch", type=int, default=1, help="images at a time, for the times")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--n", type=int, default=2000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    splits = open_data(asked.data / "cifar10", input_size=(3, 32, 32))
    network = Network("resnet18-narrow", narrow_resnet18, {**RECIPE, "epochs": 12})
    tell = partial(print, flush=True)
    dense, told = dense_model(network, splits, THREAT, asked.cache, None, "cpu", tell)
    clean, labels = calibration_images(dense, splits, IMAGES, 0)
    attacked = adversarial_set(dense, clean, labels, threat=THREAT, seed=0)
    images = torch.cat([attacked.images, clean])
    with (asked.out / "runs.jsonl").open("a", encoding="utf-8") as log:

        def write(line: dict[str, Any]) -> None:
            print(json.dumps(line), file=log, flush=True)

        write(
            {**vars(asked), **{k: str(getattr(asked, k)) for k in ("data", "out", "cache")}}
            | {"versions": library_versions(), **hardware(torch.device("cpu")), "dense": told}
        )
        write({"dense": verdicts(dense, splits.test, asked.n, THREAT, "pgd")})
        options = {"latency_batch": asked.batch, "latency_threads": 1}
        sets = [(block,) for block in WHOLE]
        sets += [WHOLE[2:], WHOLE[1:]]
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(dense, splits, THREAT, options, Path(folder))
            for blocks in sets:
                found = row(bench, blocks, images, asked)
                write(found)
                print(said(found), flush=True)


if __name__ == "__main__":
    main()
