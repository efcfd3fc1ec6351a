"""Robust accuracy at equal time: a plan made for time beside the plan for multiply-adds as fast.

    python -m benchmarks.equal_time --weights cifar10-resnet10-robust.pt --data cifar10 \
        --out benchmarks/records/<date>_equal-time

The robust ResNet-10 for CIFAR-10, or any .safetensors file of this package, un-tuned. Half of the
time is to go. Then the ratio of multiply-adds is sought whose plan takes the same time, timed by
turns with the first one in one process, and both models are attacked on the same test images. What
planning measures is shared.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import robust_prune
from benchmarks.runs import NETWORK, log_of
from robust_prune.data import open_data
from robust_prune.latency import alternating, conditions_of
from robust_prune.models import image_size_of, open_model
from robust_prune.options import LatencyOptions
from robust_prune.types import ThreatModel

RATIO, PAIRS = 0.5, 40
CLOSE, ROUNDS = 0.01, 8  # of the dense model's time


@dataclass
class Bench:
    """One model and its data, and how it is timed."""

    dense: nn.Module
    splits: Any
    threat: ThreatModel
    options: dict[str, Any]
    folder: Path
    size: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.size = tuple(self.splits.test.take(1, 0)[0].shape[1:])

    def planned(self, target: str, ratio: float) -> Any:
        """Prune to a ratio of the time or of the multiply-adds; measure only once."""
        return robust_prune.compress(
            self.dense,
            self.splits,
            threat=self.threat,
            prune_ratio=ratio,
            target=target,
            evaluation="none",
            measured=self.folder / "measured.safetensors",
            **self.options,
        )

    def shares(self, *models: nn.Module) -> list[float]:
        """Return the time of models in shares of the dense model's, all timed by turns."""
        conditions = conditions_of(LatencyOptions(**self.options), torch.device("cpu"))
        images = torch.rand(self.options["latency_batch"], *self.size)
        dense, *times = alternating([self.dense, *models], images, conditions, PAIRS)
        return [time / dense for time in times]


def as_fast(bench: Bench, timed: nn.Module, ratio: float) -> tuple[Any, list[dict[str, float]]]:
    """Return the plan for multiply-adds whose model takes as long, and what was tried first."""
    low, high = 0.02, 0.98
    tried: list[dict[str, float]] = []
    results = {}
    for _ in range(ROUNDS):
        result = bench.planned("macs", ratio)
        wanted, share = bench.shares(timed, result.model)
        tried.append({"ratio": ratio, "share": share, "wanted": wanted})
        results[ratio] = result
        print(
            f"{ratio:.3f} of the multiply-adds: {share:.3f} of the time, {wanted:.3f} wanted",
            flush=True,
        )
        if abs(share - wanted) <= CLOSE:
            break
        low, high = (ratio, high) if share > wanted else (low, ratio)
        step = ratio + (share - wanted)  # time falls about as multiply-adds do
        ratio = step if low < step < high else (low + high) / 2
    best = min(tried, key=lambda one: abs(one["share"] - one["wanted"]))
    return results[best["ratio"]], tried


def compared(bench: Bench, n: int) -> dict[str, Any]:
    """Make both models, and attack them and the dense one."""
    timed = bench.planned("latency", RATIO)
    counted, tried = as_fast(bench, timed.model, timed.plan.reached)
    models = {"dense": bench.dense, "latency": timed.model, "macs": counted.model}
    found = {
        name: robust_prune.evaluate(
            model, bench.splits.test, threat=bench.threat, attack="pgd", n=n
        )
        for name, model in models.items()
    }
    shares = bench.shares(timed.model, counted.model)
    test = found["latency"].compare(found["macs"])
    return {
        **bench.options,
        "n": n,
        "time_left": dict(zip(("latency", "macs"), shares, strict=True)),
        "macs_left": {"latency": 1 - timed.plan.reached, "macs": 1 - counted.plan.reached},
        "params_left": {
            name: result.plan.pruned.params / result.plan.dense.params
            for name, result in (("latency", timed), ("macs", counted))
        },
        "tried": tried,
        "accuracy": {
            name: {m.attack: str(m.accuracy) for m in evaluation.measurements}
            for name, evaluation in found.items()
        },
        "latency_against_macs": {
            attack: {
                "latency_only": pair.first_only,
                "macs_only": pair.second_only,
                "p": pair.p_value,
            }
            for attack, pair in test.items()
        },
        "planned": timed.report.get("latency"),
        "widths": {
            name: {g.name: [g.width, g.keep_width] for g in result.plan.groups}
            for name, result in (("latency", timed), ("macs", counted))
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 64))
    parser.add_argument("--eps", default="8/255", help="Linf")
    parser.add_argument("--n", type=int, default=2000)
    asked = parser.parse_args()
    known = asked.weights.suffix == ".safetensors"
    model, _ = open_model(str(asked.weights), **({} if known else NETWORK))
    splits = open_data(
        str(asked.data), input_size=image_size_of(model, None if known else (3, 32, 32))
    )
    threat = ThreatModel.linf(asked.eps)
    told = {"model": asked.weights.name, "threat": str(threat), "ratio": RATIO, "pairs": PAIRS}
    with log_of(asked.out, **told) as write:
        for batch in asked.batches:
            options = {"latency_batch": batch, "latency_threads": 1}
            with tempfile.TemporaryDirectory() as folder:
                found = compared(Bench(model, splits, threat, options, Path(folder)), asked.n)
            write(found)
            print(f"batch {batch}: {found['time_left']} {found['accuracy']}", flush=True)


if __name__ == "__main__":
    main()
