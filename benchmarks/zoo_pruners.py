"""One network of the zoo, pruned to half by torch-pruning's own pruner on this package's graph."""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

import robust_prune as rp
from robust_prune.graph import ModelGraph, count_cost
from robust_prune.models import build_model, default_input_size, resolve_spec
from robust_prune.modules import difference

RATIO = 0.5
WITHIN = 0.05  # one ratio for all groups can't come closer where most have few units
TOLERANCES = ((torch.float64, 1e-6), (torch.float32, 1e-3))
IMAGES = 4  # that MRS is measured on: the rule, not its accuracy, is what is tried
NO_FLOOR = 0.999  # max_prune_ratio: with L2 every group may lose all but its last unit, too
CLASSES = 10  # of the classifier that MRS needs where a network ends before one


def on_our_graph(arch: str, criterion: str, enliven_: Any) -> dict[str, Any]:
    """Prune one network by `BasePruner`, local, and return every figure of its row.

    Args:
        arch: timm's name, or `torchvision/NAME`.
        criterion: `l2` or `mrs`.
        enliven_: gives the network weights that show errors.
    """
    torch.manual_seed(0)
    row: dict[str, Any] = {}
    spec = resolve_spec(arch)
    if criterion == "mrs" and not spec.num_classes:
        row["classifier"] = CLASSES
        spec = resolve_spec(arch, {"num_classes": CLASSES})
    model = build_model(spec).eval()
    enliven_(model.net)
    size = default_input_size(spec)
    images = torch.rand(IMAGES, *size, generator=torch.Generator().manual_seed(1))
    dense = copy.deepcopy(model)
    importance = tp.importance.GroupMagnitudeImportance()
    if criterion == "mrs":
        start = time.perf_counter()
        importance = measured(model, images)
        row["measured_s"] = time.perf_counter() - start
    start = time.perf_counter()
    with rp.dependency_graph():
        pruner = tp.pruner.BasePruner(model, images[:1], importance, pruning_ratio=RATIO)
    row["graph_s"] = time.perf_counter() - start
    row["groups"] = len(pruner.DG.groups)
    row["channel_ratio"] = half(model, size, pruner.DG, floors=criterion == "mrs")
    pruner.per_step_pruning_ratio = [0.0, row["channel_ratio"]]
    before = count_cost(model, size).macs
    start = time.perf_counter()
    pruner.step()
    row["step_s"] = time.perf_counter() - start
    row["reached"] = 1 - count_cost(model, size).macs / before
    row["masking_error"], row["dtype"] = compared(model, pruner.DG.mask_(dense), images[:1])
    row["reload_equal"] = reloaded_equal(model, images[:1])
    model.train()
    model(images[:2]).square().mean().backward()
    row["backward"] = all(
        bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None
    )
    limit = dict(TOLERANCES)[getattr(torch, row["dtype"])]
    row["pass"] = bool(
        abs(row["reached"] - RATIO) <= WITHIN
        and row["masking_error"] < limit
        and row["reload_equal"]
        and row["backward"]
    )
    return row


def measured(model: nn.Module, images: Tensor) -> rp.MRSImportance:
    """Return MRS as an importance, measured on images [N, C, H, W] with labels by turns."""
    with torch.no_grad():
        labels = torch.arange(len(images)) % model(images[:1]).shape[1]
    return rp.MRSImportance(
        model, (images, labels), rule="mrs", n=len(images), steps=1, max_prune_ratio=NO_FLOOR
    )


def half(model: nn.Module, size: tuple[int, int, int], groups: Any, *, floors: bool) -> float:
    """Return the ratio by which local pruning of all groups comes nearest to half the work.

    A group that a ratio leaves nothing of is skipped by the pruner and stays whole; with MRS,
    `floors`, it keeps its least units.
    """
    costs = ModelGraph(model, size, probe=False, ties=groups.ties)
    dense = costs.cost().macs
    limit: float = 1 - 1 / min(g.units for g in groups.groups)

    def left(ratio: float) -> float:
        least = {g.name: g.min_units if floors else 1 for g in groups.groups}
        kept = {g.name: max(least[g.name], int(g.units * (1 - ratio))) for g in groups.groups}
        return costs.cost({g.name: kept[g.name] * g.blocks for g in groups.groups}).macs / dense

    low, high = 0.0, 1.0
    for _ in range(14):
        ratio = (low + high) / 2
        low, high = (ratio, high) if left(ratio) > RATIO else (low, ratio)
    if left(high) > RATIO and not floors:  # out of reach
        return limit
    return min(low, high, key=lambda ratio: abs(left(ratio) - RATIO))


@torch.no_grad()
def compared(pruned: nn.Module, masked: nn.Module, images: Tensor) -> tuple[float, str]:
    """Return how far the pruned model is from the masked dense one, and in what it was computed."""
    for dtype, limit in TOLERANCES:
        try:
            one, two = (copy.deepcopy(m).to(dtype)(images.to(dtype)) for m in (pruned, masked))
        except RuntimeError:  # float32 is part of its code
            continue
        error = difference(one, two)
        if error < limit or dtype == torch.float32:
            return error, str(dtype).removeprefix("torch.")
    return float("inf"), "float32"


@torch.no_grad()
def reloaded_equal(model: nn.Module, images: Tensor) -> bool:
    """Return whether the saved file gives the same model, tensor by tensor, bit for bit.

    Not its outputs: at odd widths those of a mere copy can differ in the last digit on a CPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        again = rp.load(rp.save(model, Path(folder) / "pruned.safetensors"))
    state = again.state_dict()
    same = all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    return same and difference(again(images), model(images)) < 1e-4
