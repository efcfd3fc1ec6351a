"""Why single-step adversarial training from scratch collapses on a narrow network.

    python -m benchmarks.collapse --data DIR --out RECORD [--runs "NAME; NAME"] [--seeds 0,1]

Each run differs from N-FGSM from scratch, or from careful N-FGSM, in what its name says. A run
that is measured is a line of OUT/runs.jsonl; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.criteria.networks import Network, narrow_resnet
from benchmarks.finetuning.protocol import measured
from robust_prune.adversaries import pgd_correct
from robust_prune.data import DataSplits, open_data
from robust_prune.finetune import Attack, EpochRecord, TrainingConfig, train_
from robust_prune.models import library_versions
from robust_prune.modules import ImageModel
from robust_prune.options import BatchNormMode
from robust_prune.pipeline import hardware
from robust_prune.statistics import Proportion
from robust_prune.types import ThreatModel

THREAT = ThreatModel.linf("8/255")
SIZE = (3, 32, 32)
NETWORK = Network("resnet10-narrow", partial(narrow_resnet, width=16), {})
ADVERSARIAL_EPOCHS = 3
COLLAPSED = 0.05  # PGD accuracy; guessing gives 0.1 before an attack


@dataclass(frozen=True)
class Factors:
    """What is varied; the values here are those of the runs that collapsed.

    `epochs` of adversarial training come after the clean ones. `steps` 1 is N-FGSM, more PGD.
    """

    attack_batchnorm: BatchNormMode = "train"
    clean_epochs: int = 0
    eps_warmup: int = 0
    steps: int = 1
    lr: float = 0.2
    augment: bool = True
    amp: bool = True
    epochs: int = ADVERSARIAL_EPOCHS

    def config(self, seed: int) -> TrainingConfig:
        """Return the training run."""
        return TrainingConfig(
            method="n-fgsm" if self.steps == 1 else "pgd-at",
            attack_steps=self.steps,
            epochs=self.clean_epochs + self.epochs,
            threat=THREAT,
            lr=self.lr,
            clean_epochs=self.clean_epochs,
            eps_warmup=self.eps_warmup,
            attack_batchnorm=self.attack_batchnorm,
            augment=self.augment,
            amp=self.amp,
            on_collapse="continue",
            seed=seed,
        )


SCRATCH = Factors()
CAREFUL = Factors("eval", clean_epochs=2, eps_warmup=2)
RUNS = {
    "scratch": SCRATCH,
    "scratch, eval": replace(SCRATCH, attack_batchnorm="eval"),
    "scratch, clean epochs": replace(SCRATCH, clean_epochs=2),
    "scratch, eps warm-up": replace(SCRATCH, eps_warmup=2),
    "scratch, 2 steps": replace(SCRATCH, steps=2),
    "scratch, 2 steps, eval": replace(SCRATCH, steps=2, attack_batchnorm="eval"),
    "scratch, lr 0.05": replace(SCRATCH, lr=0.05),
    "scratch, lr 0.05, eval": replace(SCRATCH, lr=0.05, attack_batchnorm="eval"),
    "scratch, lr 0.05, clean epochs": replace(SCRATCH, lr=0.05, clean_epochs=2),
    "scratch, no augmentation": replace(SCRATCH, augment=False),
    "scratch, float32": replace(SCRATCH, amp=False),
    "careful": CAREFUL,
    "careful, train": replace(CAREFUL, attack_batchnorm="train"),
    "careful, no clean epochs": replace(CAREFUL, clean_epochs=0),
    "careful, no eps warm-up": replace(CAREFUL, eps_warmup=0),
    "careful, lr 0.05": replace(CAREFUL, lr=0.05),
    "careful, 2 steps": replace(CAREFUL, steps=2),
}


def main() -> None:
    """Measure the runs that are not recorded yet, and print the table."""
    options = _options()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    path = out / "runs.jsonl"
    if options.data:
        _write_settings(out)
        splits = open_data(options.data, input_size=SIZE)
        with (out / "log.txt").open("a") as log:

            def tell(line: str) -> None:
                for stream in (sys.stdout, log):
                    print(line, file=stream, flush=True)

            for seed in options.seeds:
                for name in options.runs:
                    if not any((r["run"], r["seed"]) == (name, seed) for r in read(path)):
                        found = measure(name, RUNS[name], seed, splits, tell)
                        with path.open("a") as file:
                            file.write(json.dumps(found) + "\n")
    text = table(read(path))
    (out / "summary.md").write_text(text)
    print(text)


def measure(
    name: str, factors: Factors, seed: int, splits: DataSplits, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Train one network from random weights, and return its epochs as plain data."""
    model = NETWORK.create(splits.classes, splits.input_size, seed)
    config = factors.config(seed)
    assert splits.validation is not None
    images, labels = splits.validation.take(config.validation_images, seed)
    epochs: list[dict[str, Any]] = []

    def on_epoch(record: EpochRecord) -> None:
        further = _further(model, images, labels, seed)
        epochs.append({**measured(record), **further, "eps": config.threat_at(record.epoch).eps})
        tell(f"{name}, seed {seed}: {_describe(epochs[-1])}")

    history = train_(model, splits.train, splits.validation, config, on_epoch=on_epoch)
    return {
        "run": name,
        "seed": seed,
        "factors": asdict(factors),
        "images": len(labels),
        "epochs": epochs,
        "notes": list(history.notes),
    }


@torch.no_grad()
def _further(model: ImageModel, images: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    """Return FGSM accuracy, and clean and PGD accuracy where batch norms use batch statistics."""
    fgsm = pgd_correct(
        model, images, labels, threat=THREAT, steps=1, step_size=THREAT.eps, seed=seed
    )
    attack = Attack(THREAT, 10, torch.Generator().manual_seed(seed), batchnorm="train")
    right = {"clean": 0, "robust": 0}
    for part, target in zip(torch.split(images, 256), torch.split(labels, 256), strict=True):
        adversarial = attack(model, part, target)
        with attack.seen_by(model) as seen:
            right["clean"] += int((seen(part).argmax(1) == target).sum())
            right["robust"] += int((seen(adversarial).argmax(1) == target).sum())
    return {
        "single_step": float(fgsm.double().mean()),
        "batch_clean": right["clean"] / len(labels),
        "batch_robust": right["robust"] / len(labels),
    }


def _describe(epoch: dict[str, Any]) -> str:
    loss = f"loss {epoch['loss']:.3f}, " if epoch["epoch"] else ""
    return (
        f"epoch {epoch['epoch']}, eps {255 * epoch['eps']:.1f}/255, {loss}"
        f"clean {100 * epoch['clean']:.1f} FGSM {100 * epoch['single_step']:.1f} PGD-10 "
        f"{100 * epoch['robust']:.1f}, with batch statistics clean "
        f"{100 * epoch['batch_clean']:.1f} PGD-10 {100 * epoch['batch_robust']:.1f}, "
        f"{epoch['seconds']:.0f} s"
    )


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Return Markdown: one row for each run, the last epoch's accuracies and all PGD ones."""
    lines = [
        "| run | seed | attack's batch norm | clean epochs | eps warm-up | steps | lr | clean % | "
        "FGSM % | PGD-10 % | PGD-10 % by adversarial epoch | batch statistics: clean, PGD-10 % |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in sorted(runs, key=lambda r: (list(RUNS).index(r["run"]), r["seed"])):
        factors, last = run["factors"], run["epochs"][-1]
        course = [e["robust"] for e in run["epochs"] if e["epoch"] > factors["clean_epochs"]]
        low, high = Proportion(round(last["robust"] * run["images"]), run["images"]).interval
        mark = "**collapsed** " if last["robust"] < COLLAPSED else ""
        lines.append(
            f"| {run['run']} | {run['seed']} | {factors['attack_batchnorm']} | "
            f"{factors['clean_epochs']} | {factors['eps_warmup']} | {factors['steps']} | "
            f"{factors['lr']:g} | {100 * last['clean']:.1f} | {100 * last['single_step']:.1f} | "
            f"{mark}{100 * last['robust']:.1f} [{100 * low:.1f}, {100 * high:.1f}] | "
            f"{', '.join(f'{100 * r:.1f}' for r in course)} | "
            f"{100 * last['batch_clean']:.1f}, {100 * last['batch_robust']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """Return the runs measured so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write_settings(out: Path) -> None:
    settings = {
        "network": "ResNet with one block a stage, 16 to 128 channels",
        "threat": str(THREAT),
        "training": {**asdict(SCRATCH.config(0)), "threat": str(THREAT)},
        "versions": library_versions(),
        "hardware": hardware(torch.device("cpu")),
    }
    (out / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="image folder; without it only the table is written anew")
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument(
        "--runs",
        type=lambda text: [name.strip() for name in text.split(";")],
        default=list(RUNS),
        help="names of runs, with semicolons between them; default all",
    )
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0])
    options = parser.parse_args()
    unknown = [name for name in options.runs if name not in RUNS]
    if unknown:
        parser.error(f"no run is named {unknown[0]!r}; there are {'; '.join(RUNS)}")
    return options


if __name__ == "__main__":
    main()
