"""How long the stations before fine-tuning take, against their limits.

    python -m benchmarks.speed [--few | --pruners] [--out benchmarks/records/DATE_speed]

Everything is measured in this process on one thread; the record starts with settings, versions
and hardware. Random weights and images: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
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
import torch_pruning as tp

import robust_prune as rp
from robust_prune.adversaries import AdversarialSet
from robust_prune.allocation import Problem, allocate_evenly, make_plan
from robust_prune.criteria import ascent, channel_scores, first_order
from robust_prune.graph import ModelGraph
from robust_prune.models import library_versions
from robust_prune.pipeline import hardware
from robust_prune.types import Budget, ThreatModel

SIZES = {
    "resnet18": (32, 224),
    "resnet50": (32, 224),
    "vgg16_bn": (32, 224),
    "vgg16": (32, 224),
    "mobilevit_s": (64, 224),
    "mobilevitv2_050": (64, 224),
    "densenet121": (64, 224),
    "vit_base_patch16_224": (224,),
}
LIMITS = {  # seconds for graph, plan and pruning together
    ("resnet50", 224): 15,
    ("mobilevit_s", 224): 3,
    ("mobilevitv2_050", 224): 3,
    ("densenet121", 224): 5,
    ("vit_base_patch16_224", 224): 5,
}
PRUNER_LIMITS = {"mobilevit_s": 1, "densenet121": 2, "vit_base_patch16_224": 5}  # CPU seconds
DEPTHS = (2, 4, 8, 16, 25)  # blocks in each of four stages: ResNet-18 to ResNet-202


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


def graph_plan_prune(arch: str, size: int, **kwargs: Any) -> dict[str, float]:
    """Build the graph (with its probe), plan by L2 to half of the multiply-adds, and prune."""
    model = timm.create_model(arch, num_classes=10, **kwargs).eval()
    start = time.perf_counter()
    graph = ModelGraph(model, (3, size, size))
    built = time.perf_counter()
    problem = Problem(graph.groups, graph.cost, Budget("macs", 0.5))
    widths = allocate_evenly(problem)
    scores = channel_scores(model, graph, score="l2")
    plan = make_plan(
        problem,
        widths,
        {n: s.tolist() for n, s in scores.items()},
        allocation="uniform",
        score="l2",
        seed=0,
        input_size=(3, size, size),
        ties=graph.ties,
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
        "groups": len(graph.groups),
    }


def pruner_seconds(arch: str, *, ours: bool) -> dict[str, Any]:
    """CPU seconds of torch-pruning's pruner, made and stepped by L2, on our graph or its own.

    CPU seconds of one thread, which other work on the machine hardly changes.
    """
    torch.manual_seed(0)
    model, images = timm.create_model(arch, num_classes=10).eval(), torch.rand(1, 3, 224, 224)
    importance = tp.importance.GroupMagnitudeImportance()
    options: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
    with rp.dependency_graph() if ours else contextlib.nullcontext():
        start = time.process_time()
        pruner = tp.pruner.BasePruner(
            model,
            images,
            importance,
            pruning_ratio=0.3,
            ignored_layers=[model.get_classifier()],
            **options,
        )
    built = time.process_time()
    try:
        pruner.step()
        model(images)
        error = ""
    except (RuntimeError, IndexError) as fault:
        error = str(fault).splitlines()[0]
    done = time.process_time()
    return {"graph": built - start, "step": done - built, "total": done - start, "error": error}


def pruners() -> dict[str, dict[str, Any]]:
    """Return by network what the pruner takes on both graphs, and print it."""
    found = {}
    for ours in (True, False):
        pruner_seconds("resnet18", ours=ours)  # what is imported at its first use
    for arch, limit in PRUNER_LIMITS.items():
        found[arch] = {
            name: min(
                (pruner_seconds(arch, ours=ours) for _ in range(2)), key=lambda row: row["total"]
            )
            for name, ours in (("ours", True), ("alone", False))
        }
        for name, row in found[arch].items():
            print(
                f"{arch:20} {name:5} graph {row['graph']:5.2f}  step {row['step']:5.2f}  total "
                f"{row['total']:5.2f} CPU seconds"
                + (f"   (limit {limit})" if name == "ours" else "")
                + (f"   {row['error']}" if row["error"] else "")
            )
    return found


def mrs_cost(size: int) -> dict[str, float]:
    """Seconds of MRS of every layer, as a multiple of one forward and backward pass."""
    model = timm.create_model("resnet18", num_classes=10).eval()
    images, labels = torch.rand(64, 3, size, size), torch.randint(0, 10, (64,))
    adversarial = AdversarialSet(images, labels, ThreatModel.linf("8/255"), "given", 0, 32)

    def plain() -> None:
        for part, target in adversarial.batches():
            F.cross_entropy(model(part), target).backward()  # type: ignore[no-untyped-call]

    plain()
    one = min(seconds(plain) for _ in range(5))
    fast = min(seconds(lambda: first_order(model, adversarial, rho=0.1)) for _ in range(5))
    slow = seconds(lambda: ascent(model, adversarial, rho=0.1, epochs=10))
    return {
        "image_size": size,
        "forward_backward_seconds": one,
        "first_order_multiple": fast / one,
        "ascent_multiple": slow / one,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder to write the record to")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--pruners", action="store_true", help="measure torch-pruning's alone")
    parts.add_argument("--few", action="store_true", help="what has a limit, MRS at 32 pixels")
    options = parser.parse_args()
    out: Path | None = options.out
    torch.set_num_threads(1)
    torch.manual_seed(0)
    record: dict[str, Any] = {
        "settings": {"threads": 1, "seed": 0, "budget": "half of the multiply-adds"},
        "versions": library_versions(),
        "hardware": hardware(torch.device("cpu")),
    }
    if options.pruners:
        record["pruner_seconds"] = pruners()
    else:
        measure(record, few=options.few)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")


def measure(record: dict[str, Any], *, few: bool = False) -> None:
    """Add everything to a record, or what has a limit, and print it."""
    record["help_seconds"] = help_seconds()
    print(f"robust-prune --help           {record['help_seconds']:6.2f} s   (limit 0.4)")
    record["prune_seconds"] = {}
    for arch, sizes in SIZES.items():
        for size in sizes:
            if few and (arch, size) not in LIMITS:
                continue
            found = graph_plan_prune(arch, size)
            record["prune_seconds"][f"{arch}@{size}"] = found
            limit = LIMITS.get((arch, size))
            print(
                f"{arch:20}@{size:3} graph {found['graph']:5.2f}  plan {found['plan']:5.2f}  prune "
                f"{found['prune']:5.2f}  total {found['total']:6.2f} s"
                + (f"   (limit {limit})" if limit else "")
            )
    if not few:
        record["pruner_seconds"] = pruners()
    record["depth_seconds"] = {}
    for blocks in DEPTHS[:3] if few else DEPTHS:
        narrow = {"layers": (blocks,) * 4, "channels": (16, 32, 64, 128)}
        found = graph_plan_prune("resnet18", 32, **narrow)
        record["depth_seconds"][f"resnet-{8 * blocks + 2}"] = found
        print(
            f"ResNet-{8 * blocks + 2:<4} {found['groups']:4.0f} groups  total "
            f"{found['total']:6.2f} s, {1000 * found['total'] / found['groups']:.1f} ms a group"
        )
    record["mrs"] = mrs_cost(32 if few else 64)
    print(
        f"first-order MRS of all layers {record['mrs']['first_order_multiple']:6.2f} x one forward "
        f"and backward pass (limit 3); ascent {record['mrs']['ascent_multiple']:.0f} x"
    )


if __name__ == "__main__":
    main()
