"""MRS estimators side by side, and which of them knows what pruning a group really costs."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.criteria.protocol import Bench
from robust_prune import pipeline
from robust_prune.adversaries import adversarial_set
from robust_prune.allocation import Problem, best_composed, make_plan
from robust_prune.criteria import channel_scores, sensitivities, structural_curves
from robust_prune.finetune import Attack, pgd_at
from robust_prune.graph import ModelGraph
from robust_prune.pipeline import Settings
from robust_prune.repair import recalibrate_batchnorm_
from robust_prune.types import Budget, PruningPlan

EPOCHS = 10
BATCHNORM_IMAGES = 512
EPOCH_IMAGES, TIMED_IMAGES = 10_000, 1024
PLANNING = ("adversarial set", "scores", "curves", "sensitivity", "reconstruction", "plan")


def run(bench: Bench, out: Path, n: int, tell: Callable[[str], None]) -> None:
    """Measure a network's estimators once; the record is `estimators-NETWORK.json`."""
    path = out / f"estimators-{bench.network.replace('/', '-')}.json"
    if path.exists():
        return
    model, splits = bench.model, bench.splits
    assert splits.validation is not None
    graph = ModelGraph(model, splits.input_size)
    images, labels = splits.validation.take(min(n, len(splits.validation)), 0)
    adversarial = adversarial_set(model, images, labels, threat=bench.threat, batch_size=64)
    scores = channel_scores(model, graph, score="l2")
    found: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    methods: tuple[str, ...] = ("first-order", "ascent")
    for method in methods:
        sensitivity = sensitivities(
            model,
            adversarial,
            method=method,
            epochs=EPOCHS,
            groups=graph.groups,
        )
        found[method], seconds[method] = sensitivity.of_groups(), sensitivity.seconds
    start = time.perf_counter()
    curves = structural_curves(model, graph, scores, adversarial)
    seconds["structural"] = time.perf_counter() - start
    found["structural"] = {name: curve.at(0.5) for name, curve in curves.items()}

    problem = Problem(graph.groups, graph.cost, Budget("channels", 0.5))
    plans = [
        make_plan(
            problem,
            {
                g.name: g.width // 2 // g.blocks * g.blocks if g is half else g.width
                for g in graph.groups
            },
            {name: s.tolist() for name, s in scores.items()},
            allocation="half of one group",
            score="l2",
            seed=0,
            input_size=splits.input_size,
            ties=graph.ties,
        )
        for half in graph.groups
    ]

    def repair_(pruned: nn.Module, plan: PruningPlan) -> None:
        batches = splits.train.batches(64, seed=0, limit=BATCHNORM_IMAGES)
        recalibrate_batchnorm_(pruned, batches)

    _, losses = best_composed(
        graph, plans, images, labels, threat=bench.threat, seed=0, repair_=repair_
    )
    found["measured"] = {g.name: loss for g, loss in zip(graph.groups, losses, strict=True)}
    record = {"network": bench.network, "images": len(images), "seconds": seconds, "groups": found}
    path.write_text(json.dumps(record, indent=1) + "\n")
    tell(f"{bench.network}: estimators on {len(graph.groups)} groups, seconds {seconds}")


def run_effort(bench: Bench, out: Path, tell: Callable[[str], None]) -> None:
    """Time planning against PGD-2 adversarial training; the record is `effort-NETWORK.json`.

    An epoch of 10,000 images is timed on 1,024, without augmentation and validation.
    """
    path = out / f"effort-{bench.network.replace('/', '-')}.json"
    if path.exists():
        return
    settings = Settings(
        budget=Budget("macs", 0.5),
        threat=bench.threat,
        calibration_images=bench.calibration_images,
        batch_size=bench.batch_size,
    )
    seconds = pipeline.run(bench.model, bench.splits, settings).report["seconds"]
    planning = sum(seconds[name] for name in PLANNING)
    model = copy.deepcopy(bench.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    attack = Attack(bench.threat, 2, torch.Generator().manual_seed(0))
    seen, start = 0, time.perf_counter()
    for images, labels in bench.splits.train.batches(bench.batch_size, limit=TIMED_IMAGES):
        optimizer.zero_grad()
        pgd_at(model, images, labels, attack).backward()
        optimizer.step()
        seen += len(images)
    epoch = (time.perf_counter() - start) * EPOCH_IMAGES / seen
    record = {"network": bench.network, "planning": planning, "epoch": epoch, "stations": seconds}
    path.write_text(json.dumps(record, indent=1) + "\n")
    tell(f"{bench.network}: planning {planning:.1f} s, an epoch of PGD-2 {epoch:.1f} s")


def efforts(out: Path) -> str:
    """Return seconds of planning and of an epoch as Markdown."""
    lines = [
        "## Seconds: measuring and planning, against an epoch of PGD-2 on 10,000 images",
        "",
        "| network | planning | epoch |",
        "|---|---|---|",
    ]
    for path in sorted(out.glob("effort-*.json")):
        record = json.loads(path.read_text())
        lines.append(f"| {record['network']} | {record['planning']:.1f} | {record['epoch']:.1f} |")
    return "\n".join(lines) + "\n"


def table(out: Path) -> str:
    """Return Spearman rank correlations as Markdown."""
    lines = [
        "## MRS estimators: Spearman's rank correlation over groups",
        "",
        "Measured: the loss under PGD-5 of the model with half of the group really removed.",
        "",
        "| network | groups | ascent, first-order | ascent, structural | first-order, structural | "
        "measured, ascent | measured, first-order | measured, structural | seconds (ascent, "
        "first-order, structural) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(out.glob("estimators-*.json")):
        record = json.loads(path.read_text())
        seconds = record["seconds"]
        pairs = (
            ("ascent", "first-order"),
            ("ascent", "structural"),
            ("first-order", "structural"),
            ("measured", "ascent"),
            ("measured", "first-order"),
            ("measured", "structural"),
        )
        groups, found = correlations(path, pairs)
        values = " | ".join(f"{value:.2f}" for value in found)
        times = ", ".join(f"{seconds[m]:.1f}" for m in ("ascent", "first-order", "structural"))
        lines.append(f"| {record['network']} | {groups} | {values} | {times} |")
    return "\n".join(lines) + "\n"


def correlations(path: Path, pairs: Sequence[tuple[str, str]]) -> tuple[int, list[float]]:
    """Return how many groups a network has, and the rank correlations of pairs of columns."""
    groups = json.loads(path.read_text())["groups"]
    return len(groups["measured"]), [spearman(groups[a], groups[b]) for a, b in pairs]


def spearman(first: dict[str, float], second: dict[str, float]) -> float:
    """Return Spearman's rank correlation."""
    from scipy.stats import spearmanr

    names = list(first)
    return float(spearmanr([first[n] for n in names], [second[n] for n in names]).statistic)
