"""Half of the multiply-adds with widths as they come, and with `--round-to auto`.

    python -m benchmarks.rounding --out benchmarks/records/<date>_rounding

Networks of timm with random weights, which times do not depend on; one thread. Dense and pruned
models by turns, at batches of 1, 16 and 64.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import robust_prune
from benchmarks.runs import log_of
from robust_prune.latency import Conditions, alternating
from robust_prune.models import build_model, resolve_spec

NETWORKS = ("resnet18", "mobilevit_xxs")
BATCHES = {1: 20, 16: 7, 64: 3}  # and how often every model has its turn


def measured(name: str) -> dict[str, Any]:
    """Prune half of a network in both ways, and time all three."""
    torch.manual_seed(0)
    size = (3, 256, 256) if name.startswith("mobilevit") else (3, 224, 224)
    dense = build_model(resolve_spec(name, {"num_classes": 10})).eval()
    pruned = {
        how: robust_prune.compress(
            dense,
            None,
            prune_ratio=0.5,
            allocation="uniform",
            round_to=how,
            calibration_images=8,
            reconstruct=False,
            verify=False,
            input_size=size,
        )
        for how in (1, "auto")
    }
    models = [dense, *(result.model for result in pruned.values())]
    names = ["dense", *(f"round to {how}" for how in pruned)]
    times = {
        batch: dict(
            zip(
                names,
                alternating(
                    models, torch.rand(batch, *size), Conditions(batch, 1, "float32", ""), pairs
                ),
                strict=True,
            )
        )
        for batch, pairs in BATCHES.items()
    }
    return {
        "network": name,
        "image": size,
        "ms": times,
        "macs_left": {str(how): 1 - result.plan.reached for how, result in pruned.items()},
        "said": [n for n in pruned["auto"].report["notes"] if "--round-to" in n],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with log_of(asked.out, mode="w") as write:
        for name in NETWORKS:
            found = measured(name)
            write(found)
            print(name, found["said"], found["macs_left"])
            for batch, ms in found["ms"].items():
                shares = {how: round(one / ms["dense"], 3) for how, one in ms.items()}
                print(f"{name}, batch {batch}: {shares}", flush=True)


if __name__ == "__main__":
    main()
