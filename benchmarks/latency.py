"""Half of the time: what `--target latency` reaches, beside half of the multiply-adds.

    python -m benchmarks.latency --out benchmarks/records/<date>_latency

Networks of timm with random weights, images of 224 x 224: times do not depend on the weights, and
nothing is said of accuracy. Every pruned model is timed again at the end, by turns with the dense
one, in blocks that planning has not seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import robust_prune
from benchmarks.runs import log_of
from robust_prune.latency import alternating, conditions_of
from robust_prune.models import build_model, resolve_spec
from robust_prune.options import LatencyOptions

NETWORKS = ("resnet18", "mobilevit_xxs")
RATIO, PAIRS = 0.5, 40


def measured(name: str, target: str, batch: int, threads: int) -> dict[str, Any]:
    """Prune half of one target away, and time dense and pruned by turns."""
    torch.manual_seed(0)
    size = (3, 256, 256) if name.startswith("mobilevit") else (3, 224, 224)
    dense = build_model(resolve_spec(name, {"num_classes": 10})).eval()
    options: dict[str, Any] = {"latency_batch": batch, "latency_threads": threads}
    result = robust_prune.compress(
        dense,
        None,
        prune_ratio=RATIO,
        target=target,
        allocation="uniform",
        calibration_images=8,
        reconstruct=False,
        verify=False,
        input_size=size,
        **options,
    )
    conditions = conditions_of(LatencyOptions(**options), torch.device("cpu"))
    times = alternating([dense, result.model], torch.rand(batch, *size), conditions, PAIRS)
    return {
        "network": name,
        "target": target,
        "conditions": str(conditions),
        "image": size,
        "dense_ms": times[0],
        "pruned_ms": times[1],
        "time_left": times[1] / times[0],
        "macs_left": 1 - result.plan.reached,
        "planned": result.report.get("latency"),
        "seconds": result.report["seconds"],
        "notes": result.plan.notes,
        "widths": {g.name: [g.width, g.keep_width] for g in result.plan.groups},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--targets", nargs="+", default=("latency", "macs"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    told = {"ratio": RATIO, "batch": asked.batch, "pairs": PAIRS}
    with log_of(asked.out, threads=asked.threads, **told) as write:
        for name in asked.networks:
            for target in asked.targets:
                found = measured(name, target, asked.batch, asked.threads)
                write(found)
                print(
                    f"{name} {target}: {found['time_left']:.3f} of the time, "
                    f"{found['macs_left']:.3f} of the multiply-adds left",
                    flush=True,
                )


if __name__ == "__main__":
    main()
