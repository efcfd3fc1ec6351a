"""AutoAttack through the stand-in that `evaluate` attacks, beside pyautoattack on the model itself.

    python -m benchmarks.attack_speed --weights FILE --data DIR --out DIR [--n 200]

FILE is a state_dict of the small ResNet of `benchmarks.throughput`, DIR a folder of images with a
test split. Both run in this process on one thread, one after the other; beside wall time there are
seconds of CPU, in all and until each attack ended, which other work on the machine disturbs less.
The verdicts are compared image by image: the stand-in's logits are the model's up to rounding.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.throughput import THREAT, build
from robust_prune.adversaries import autoattack
from robust_prune.data import open_data
from robust_prune.models import library_versions
from robust_prune.pipeline import hardware


def timed(model: nn.Module, images: Tensor, labels: Tensor, stand_in: bool) -> dict[str, Any]:
    """Attack once; return seconds, in all and by attack, and the verdict for every image."""
    wall, cpu = time.perf_counter(), time.process_time()
    until: dict[str, float] = {}

    def note(line: str) -> None:
        print(line, flush=True)
        if line.startswith("robust accuracy after "):
            until[line.split()[3].strip(":")] = time.process_time() - cpu

    result = autoattack(
        model,
        images,
        labels,
        threat=THREAT,
        seed=0,
        batch_size=100,
        stand_in=stand_in,
        on_progress=note,
    )
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "cpu_seconds_until": until,
        "robust_after": result.robust_after,
        "robust": [bool(verdict) for verdict in result.robust],
    }


def main() -> None:
    """Attack twice, print the ratio and how many verdicts differ, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = build(options.weights).eval()
    splits = open_data(str(options.data), input_size=(3, 32, 32))
    assert splits.test is not None
    images, labels = splits.test.take(options.n, 0)
    rows = {
        "pyautoattack on the model": timed(model, images, labels, stand_in=False),
        "on the stand-in": timed(model, images, labels, stand_in=True),
    }
    exact, quicker = rows.values()
    summary = {
        "n": len(labels),
        "threat": str(THREAT),
        "robust": [sum(row["robust"]) for row in rows.values()],
        "verdicts_that_differ": sum(
            a != b for a, b in zip(exact["robust"], quicker["robust"], strict=True)
        ),
        "wall_ratio": quicker["seconds"] / exact["seconds"],
        "cpu_ratio": quicker["cpu_seconds"] / exact["cpu_seconds"],
    }
    record = {
        "summary": summary,
        "runs": rows,
        "versions": library_versions(),
        "hardware": hardware(torch.device("cpu")),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
