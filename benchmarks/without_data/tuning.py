"""Fine-tuning on pictures without labels: a smoke test on the shared ResNet.

    python -m benchmarks.without_data.tuning --data DIR --weights DIR --out RECORD

Half of the multiply-adds goes, planned on a folder of unlabelled CIFAR-10 training pictures as
`--calibration DIR` opens it; what is left learns from the dense model by `rslad` and by `ard` on
the same pictures. PGD-20 on test images before and after, and the paired test between the two.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.criteria.dense import CACHE
from benchmarks.without_data.__main__ import STEPS, bits, open_bench
from benchmarks.without_data.networks import SUBJECTS
from robust_prune.adversaries import pgd_correct
from robust_prune.data import open_pictures
from robust_prune.models import library_versions
from robust_prune.modules import predict
from robust_prune.pipeline import Settings, hardware, run
from robust_prune.statistics import PairedTest
from robust_prune.types import Budget

PICTURES = 4000
METHODS = ("rslad", "ard")
TUNING: dict[str, Any] = {"epochs": 4, "attack_steps": 3}


def unlabelled(source: Path, folder: Path, n: int) -> None:
    """Link as many pictures of every class into one folder, under names that tell nothing."""
    by_class = [sorted(each.iterdir()) for each in sorted(source.iterdir())]
    rounds = zip(*by_class, strict=False)
    pictures = [path for paths in rounds for path in paths][:n]
    for number, path in enumerate(pictures):
        (folder / f"{number}{path.suffix}").symlink_to(path.resolve())


def main() -> None:
    """Prune, tune by each method, measure, and write `tuning.json`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of image folders")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=1000, help="test images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = open_bench(SUBJECTS["resnet10"], options, print)
    threat = bench.subject.threat
    plain = Settings(budget=Budget("macs", 0.5), threat=threat)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        unlabelled(options.data / bench.subject.data / "train", Path(folder), PICTURES)
        pictures = open_pictures(folder, bench.model, input_size=bench.subject.size, workers=0)
        plan = None
        for method in (None, *METHODS):
            start = time.perf_counter()
            settings = replace(plain, plan=plan)
            if method is not None:
                settings = replace(settings, finetune=method, **TUNING)
            result = run(bench.model, pictures, settings)
            plan = result.plan
            right = pgd_correct(
                result.model, bench.images, bench.labels, threat=threat, steps=STEPS, seed=0
            )
            clean = predict(result.model, bench.images) == bench.labels
            name = method or "before"
            found[name] = {
                "pgd": bits(right),
                "clean": bits(clean),
                "seconds": round(time.perf_counter() - start, 1),
            }
            print(f"{name}: PGD-20 {100 * float(right.float().mean()):.1f}", flush=True)
    record = {
        "pictures": PICTURES,
        "tuning": TUNING,
        "plan_digest": plan.digest if plan else "",
        "versions": library_versions(),
        "hardware": hardware(torch.device("cpu")),
        "models": found,
        "paired": {m: _paired(found["before"]["pgd"], found[m]["pgd"]) for m in METHODS},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tuning.json").write_text(json.dumps(record, indent=1) + "\n")


def _paired(before: str, after: str) -> dict[str, float]:
    pairs = list(zip(before, after, strict=True))
    test = PairedTest(pairs.count(("1", "0")), pairs.count(("0", "1")))
    return {
        "right_before_alone": test.first_only,
        "right_after_alone": test.second_only,
        "p": test.p_value,
    }


if __name__ == "__main__":
    main()
