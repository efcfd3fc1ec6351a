"""What several processes do in `test_distributed.py`: each writes a JSON file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from robust_prune import ThreatModel, compress
from robust_prune.data import as_split, open_data
from robust_prune.distributed import leave, processes
from robust_prune.finetune import TrainingConfig, train_
from robust_prune.pipeline import fingerprint
from tests.conftest import tiny_resnet


class InFloat64(nn.Sequential):
    """Computes in float64 on images as the data gives them."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.double())


def plain_net() -> nn.Module:
    """No batch norm and no dropout: the gradient of a batch is the mean over its images."""
    torch.manual_seed(0)
    return InFloat64(nn.Flatten(), nn.Linear(256, 16), nn.Tanh(), nn.Linear(16, 10)).double()


def clean_loss(m: nn.Module, images: torch.Tensor, labels: torch.Tensor, a: object) -> torch.Tensor:
    return nn.functional.cross_entropy(m(images), labels)


def train_alike() -> list[float]:
    """A few steps whose result does not depend on how batches are shared out."""
    split = as_split(open_data("digits", input_size=(1, 16, 16)).train.take(57, 0))
    config = TrainingConfig(
        clean_loss,
        epochs=2,
        threat=ThreatModel.linf(0.1),
        batch_size=16,
        augment=False,
        validation_images=15,
        clip_grad=0.5,
    )
    model = plain_net()
    history = train_(model, split, split, config, processes=processes(cpu=True))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return [history.epochs[-1].loss, history.epochs[-1].clean, *weights[:40].tolist()]


def main() -> None:
    here = processes(cpu=True)
    splits = open_data("digits", input_size=(1, 16, 16))
    model = tiny_resnet(in_chans=1)
    result = compress(
        model,
        splits,
        prune_ratio=0.5,
        threat=ThreatModel.linf(0.1),
        finetune="pgd-at",
        epochs=1,
        attack_steps=1,
        batch_size=64,
        calibration_images=32,
        evaluation="pgd",
        n_eval=61,
        run_dir=sys.argv[1],
    )
    untuned = compress(model, splits, allocation="uniform", calibration_images=16).model
    statistics = {k: v for k, v in result.model.state_dict().items() if "running" in k}
    line = {
        "rank": here.rank,
        "size": here.size,
        "weights": fingerprint(result.model),
        "untuned": fingerprint(untuned),
        "statistics": float(sum(v.double().sum() for v in statistics.values())),
        "plan": result.plan.to_json(),
        "clean": result.pruned.get("clean").accuracy.value,
        "n": result.pruned.get("pgd").accuracy.n,
        "validation": [e.clean for e in result.history.epochs],
        "steps": train_alike(),
    }
    # a file each: long lines of two processes mix on one pipe
    Path(f"{sys.argv[1]}-{here.rank}.json").write_text(json.dumps(line))
    leave()


if __name__ == "__main__":
    main()
