"""As much as can go within a drop of robust accuracy, and what test images say of it.

    python -m benchmarks.max_drop --weights cifar10-resnet10-robust.pt --data cifar10 \
        --out benchmarks/records/<date>_max-drop

The robust ResNet-10 for CIFAR-10, un-tuned. The search looks at validation images; dense and pruned
are then attacked on test images, which it has not seen.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import robust_prune
from benchmarks.runs import NETWORK, log_of
from robust_prune.data import open_data
from robust_prune.models import open_model
from robust_prune.statistics import PairedDrop


def searched(model: Any, splits: Any, max_drop: float, n: int) -> dict[str, Any]:
    """Search, and measure what came out on test images."""
    start = time.process_time()
    result = robust_prune.compress(model, splits, max_drop=max_drop, evaluation="pgd", n_eval=n)
    paired = result.report["evaluation"]["paired"]["pgd"]
    drop = PairedDrop(paired["first_only"], paired["second_only"], n)
    return {
        "max_drop": max_drop,
        "search": result.report["drop_search"],
        "macs_removed": result.plan.reached,
        "test": {"n": n, "drop": drop.value, "interval": drop.interval(), "paired": paired},
        "cpu_seconds": time.process_time() - start,
        "seconds": result.report["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limits", type=float, nargs="+", default=(3.0, 1.0))
    parser.add_argument("--n", type=int, default=2000)
    asked = parser.parse_args()
    model, _ = open_model(str(asked.weights), **NETWORK)
    splits = open_data(str(asked.data), input_size=(3, 32, 32))
    with log_of(asked.out) as write:
        for limit in asked.limits:
            found = searched(model, splits, limit, asked.n)
            write(found)
            test = found["test"]
            print(
                f"{limit:g} points: {found['search']['chosen']:g} taken; on test images "
                f"{100 * test['drop']:.1f} {test['interval']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
