"""Residual blocks that go whole (`--blocks`) against channels alone, at equal time.

    python -m benchmarks.blocks --data DIR --out benchmarks/records/<date>_blocks
    python -m benchmarks.blocks --data DIR --weights cifar10-resnet10-robust.pt --out ...

A ResNet-18 for CIFAR-10 at 8/255, a quarter as wide, trained by the recipe of the matrix, or with
--weights the robust ResNet-10. Both arms are what `compress --target latency` makes, with
`--no-blocks` and with `--blocks`, attacked un-tuned and after the same fine-tuning, and timed by
turns in one process. `--cache` keeps the dense model.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import robust_prune
from benchmarks.criteria.dense import CACHE, dense_model, where_native
from benchmarks.criteria.networks import Network
from benchmarks.criteria.protocol import percent, verdicts
from benchmarks.runs import NETWORK, log_of
from robust_prune.data import DataSplits, open_data
from robust_prune.finetune import TrainingConfig, train_
from robust_prune.latency import alternating, conditions_of
from robust_prune.models import open_model
from robust_prune.modules import ImageModel, copied
from robust_prune.options import LatencyOptions
from robust_prune.statistics import PairedTest
from robust_prune.types import ThreatModel

THREAT = ThreatModel.linf("8/255")
RECIPE: dict[str, Any] = {
    "method": "pgd-at",
    "schedule": "constant",
    "ema": 0.999,
    "lr": 0.1,
    "amp": True,
    "attack_steps": 2,
}
ARMS = {"channels": False, "blocks": True}
PAIRS = 40


def narrow_resnet18(classes: int) -> nn.Module:
    """A ResNet-18 for small images, a quarter as wide."""
    net: Any = timm.create_model(
        "resnet18", num_classes=classes, channels=(16, 32, 64, 128), stem_type="deep", stem_width=8
    )
    net.conv1[0].stride = (1, 1)
    net.maxpool = nn.Identity()
    return net  # type: ignore[no-any-return]


def _dense(splits: DataSplits, asked: argparse.Namespace) -> tuple[ImageModel, dict[str, Any]]:
    """Return the dense model, and where it is from."""
    if asked.weights is not None:
        model, _ = open_model(str(asked.weights), **NETWORK)
        assert isinstance(model, ImageModel)
        return model, {"weights": asked.weights.name}
    recipe = {**RECIPE, "epochs": asked.dense_epochs}
    network = Network("resnet18-narrow", narrow_resnet18, recipe)
    tell = partial(print, flush=True)
    return dense_model(network, splits, THREAT, asked.cache, None, "cpu", tell)


def tuned(model: nn.Module, splits: DataSplits, epochs: int) -> nn.Module:
    """Fine-tune a copy as the matrix does."""
    found = copied(model)
    assert splits.validation is not None
    config = TrainingConfig(threat=THREAT, epochs=epochs, seed=0, batch_size=128, **RECIPE)
    train_(found, splits.train, splits.validation, where_native(config, "cpu"))
    return found


def row(dense: ImageModel, splits: DataSplits, ratio: float, asked: Any) -> dict[str, Any]:
    """Remove a share of the time both ways, and measure what comes out."""
    assert splits.test is not None
    options: dict[str, Any] = {"latency_batch": asked.batch, "latency_threads": 1}
    results = {
        arm: robust_prune.compress(
            *(dense, splits),
            threat=THREAT,
            prune_ratio=ratio,
            target="latency",
            blocks=blocks,
            evaluation="none",
            **options,
        )
        for arm, blocks in ARMS.items()
    }
    conditions = conditions_of(LatencyOptions(**options), torch.device("cpu"))
    models = {arm: result.model for arm, result in results.items()}
    images = torch.rand(asked.batch, *splits.input_size)
    whole, *times = alternating([dense, *models.values()], images, conditions, PAIRS)
    found: dict[str, Any] = {"ratio": ratio, "conditions": str(conditions), "dense_ms": whole}
    for (arm, result), ms in zip(results.items(), times, strict=True):
        stages = {"untuned": result.model}
        if asked.epochs:
            stages["tuned"] = tuned(result.model, splits, asked.epochs)
        found[arm] = {
            "time_left": ms / whole,
            "cost": asdict(result.plan.pruned),
            "blocks": list(result.plan.blocks),
            "rises": result.report.get("blocks"),
            "widths": {g.name: [g.width, g.keep_width] for g in result.plan.groups},
            "planned": result.report["latency"],
            "seconds": result.report["seconds"],
            **{
                stage: verdicts(model, splits.test, asked.n, THREAT, "pgd")
                for stage, model in stages.items()
            },
        }
    pairs = {s: (found["blocks"][s]["pgd"], found["channels"][s]["pgd"]) for s in stages}
    return {**found, "paired": {s: asdict(paired(*both)) for s, both in pairs.items()}}


def paired(first: str, second: str) -> PairedTest:
    """Return how often only the one, and only the other, is right; both are rows of 0 and 1."""
    pairs = list(zip(first, second, strict=True))
    return PairedTest(sum(a > b for a, b in pairs), sum(b > a for a, b in pairs))


def said(found: dict[str, Any]) -> str:
    """Return two rows of the table: time, multiply-adds, parameters, PGD-20 in percent."""
    lines = []
    for arm in ARMS:
        one = found[arm]
        cells = [f"{found['ratio']:.2f}", arm, f"{one['time_left']:.3f}"]
        cells += [f"{one['cost']['macs'] / 1e6:.1f} M", f"{one['cost']['params']:,}"]
        cells += [f"{percent(one[s]['pgd']):.1f}" for s in found["paired"]]
        lines.append("| " + " | ".join(cells) + " |")
    tests = {s: f"{PairedTest(**t).p_value:.2g}" for s, t in found["paired"].items()}
    return "\n".join([*lines, f"p {tests}; whole blocks: {found['blocks']['blocks']}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="of the ResNet-10, trained elsewhere")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--ratios", type=float, nargs="+", default=(0.5,), help="of the time")
    parser.add_argument("--batch", type=int, default=1, help="images at a time, for the times")
    parser.add_argument("--dense-epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=5, help="of fine-tuning")
    parser.add_argument("--n", type=int, default=2000)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # training too
    splits = open_data(asked.data / "cifar10", input_size=(3, 32, 32))
    dense, told = _dense(splits, asked)
    settings = {name: getattr(asked, name) for name in ("batch", "epochs", "n")}
    settings |= {"threat": str(THREAT), "pairs": PAIRS, "dense": told}
    with log_of(asked.out, **settings) as write:
        assert splits.test is not None
        write({"dense": verdicts(dense, splits.test, asked.n, THREAT, "pgd")})
        for ratio in asked.ratios:
            found = row(dense, splits, ratio, asked)
            write(found)
            print(said(found), flush=True)


if __name__ == "__main__":
    main()
