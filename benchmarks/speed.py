"""How long the stations before fine-tuning take, against their limits.

    python -m benchmarks.speed [--out benchmarks/records/DATE_speed]

Everything is measured in this process on one thread; the record starts with settings, versions
and hardware. Random weights and images: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

from robust_prune.allocation import allocate, make_plan, weights
from robust_prune.builders import versions
from robust_prune.graph import ModelGraph
from robust_prune.mrs import AdversarialSet, ascent, first_order
from robust_prune.record import hardware
from robust_prune.scores import channel_scores
from robust_prune.types import Budget, ThreatModel

ARCHS = ("resnet18", "resnet50", "vgg16_bn", "vgg16")


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def help_seconds() -> float:
    """Best of five starts of `robust-prune --help`."""
    command = [sys.executable, "-m", "robust_prune", "--help"]
    return min(
        seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(5)
    )


def graph_plan_prune(arch: str, size: int) -> dict[str, float]:
    """Build the graph (with its probe), plan by L2 to half of the multiply-adds, and prune."""
    model = timm.create_model(arch, num_classes=10).eval()
    start = time.perf_counter()
    graph = ModelGraph(model, (3, size, size))
    built = time.perf_counter()
    budget = Budget("macs", 0.5)
    widths = allocate(
        graph.groups, graph.cost, budget, weights("uniform", {g.name: 1.0 for g in graph.groups})
    )
    scores = channel_scores(
        model,
        {g.name: graph.members(g.name) for g in graph.groups},
        {g.name: g.units for g in graph.groups},
        score="l2",
    )
    plan = make_plan(
        graph.groups,
        widths,
        {n: s.tolist() for n, s in scores.items()},
        graph.cost,
        budget,
        allocation="uniform",
        score="l2",
        seed=0,
        input_size=(3, size, size),
    )
    planned = time.perf_counter()
    graph.apply_(plan)
    done = time.perf_counter()
    return {
        "graph": built - start,
        "plan": planned - built,
        "prune": done - planned,
        "total": done - start,
        "removed": plan.reached,
    }


def mrs_cost() -> dict[str, float]:
    """Seconds of MRS of every layer, as a multiple of one forward and backward pass."""
    model = timm.create_model("resnet18", num_classes=10).eval()
    images, labels = torch.rand(64, 3, 64, 64), torch.randint(0, 10, (64,))
    adversarial = AdversarialSet(images, labels, ThreatModel.linf("8/255"), "given", 0, 32)

    def plain() -> None:
        for part, target in adversarial.batches():
            F.cross_entropy(model(part), target).backward()

    plain()
    one = min(seconds(plain) for _ in range(5))
    fast = min(seconds(lambda: first_order(model, adversarial, rho=0.1)) for _ in range(5))
    slow = seconds(lambda: ascent(model, adversarial, rho=0.1, epochs=10))
    return {
        "forward_backward_seconds": one,
        "first_order_multiple": fast / one,
        "ascent_multiple": slow / one,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder to write the record to")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.manual_seed(0)
    record: dict[str, Any] = {
        "settings": {"threads": 1, "seed": 0, "budget": "half of the multiply-adds"},
        "versions": versions(),
        "hardware": hardware(torch.device("cpu")),
    }
    record["help_seconds"] = help_seconds()
    print(f"robust-prune --help           {record['help_seconds']:6.2f} s   (limit 0.4)")
    record["prune_seconds"] = {}
    for arch in ARCHS:
        for size in (32, 224):
            found = graph_plan_prune(arch, size)
            record["prune_seconds"][f"{arch}@{size}"] = found
            limit = "   (limit 15)" if (arch, size) == ("resnet50", 224) else ""
            print(
                f"{arch:9}@{size:3} graph {found['graph']:5.2f}  plan {found['plan']:5.2f}"
                f"  prune {found['prune']:5.2f}  total {found['total']:6.2f} s{limit}"
            )
    record["mrs"] = mrs_cost()
    print(
        f"first-order MRS of all layers {record['mrs']['first_order_multiple']:6.2f} x one forward "
        f"and backward pass (limit 3); ascent {record['mrs']['ascent_multiple']:.0f} x"
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
