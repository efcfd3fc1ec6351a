"""One network of a level at one share: for benchmarks that look into a single block."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.criteria.dense import CACHE, digest
from benchmarks.matrix.levels import LEVELS, LONG, OURS, Key, Tuning
from benchmarks.matrix.work import Bench
from robust_prune.adversaries import AdversarialSet, adversarial_set
from robust_prune.allocation import Problem, make_plan
from robust_prune.criteria import calibration_images, channel_scores, structural_curves
from robust_prune.data import DataSplits
from robust_prune.files import write_text
from robust_prune.graph import ModelGraph
from robust_prune.models import library_versions
from robust_prune.modules import ImageModel, seeded
from robust_prune.pipeline import Settings, hardware, run
from robust_prune.types import Budget, Curve, PruningPlan


@dataclass(frozen=True)
class Grounds:
    """What widths of a dense model are chosen by, measured once for all of them."""

    problem: Problem
    scores: Mapping[str, Tensor]
    curves: Mapping[str, Curve]
    attacked: AdversarialSet
    ties: Sequence[tuple[str, str]]
    seed: int
    input_size: tuple[int, int, int]

    def plan(self, widths: Mapping[str, int], name: str) -> PruningPlan:
        """Return the plan of these widths, the lowest scores going."""
        return make_plan(
            self.problem,
            widths,
            {group: units.tolist() for group, units in self.scores.items()},
            allocation=name,
            score="l2",
            seed=self.seed,
            input_size=self.input_size,
            ties=self.ties,
        )


@dataclass(frozen=True)
class One:
    """The dense model, its data and one seed."""

    bench: Bench
    key: Key
    splits: DataSplits
    dense: ImageModel

    @property
    def settings(self) -> Settings:
        """What a plan is replayed with, and `compress` asked for."""
        level = self.bench.level
        return Settings(
            budget=Budget("macs", self.key.ratio),
            threat=level.threat(self.key),
            seed=self.key.seed,
            score="l2",
            calibration_images=level.calibration_images,
            batch_size=level.batch_size,
        )

    def grounds(self) -> Grounds:
        """Attack calibration images, and measure L2 scores and curves of the dense model."""
        n, seed = self.bench.level.calibration_images, self.key.seed
        images, labels = calibration_images(self.dense, self.splits, n, seed)
        threat = self.settings.threat
        attacked = adversarial_set(self.dense, images, labels, threat=threat, seed=seed)
        size = self.splits.input_size
        graph = ModelGraph(self.dense, size)
        scores = channel_scores(self.dense, graph, score="l2", adversarial=attacked)
        curves = structural_curves(self.dense, graph, scores, attacked)
        problem = Problem(graph.groups, graph.cost, self.settings.budget, layers=graph.layers)
        return Grounds(problem, scores, curves, attacked, graph.ties, seed, size)

    def by_plan(self, plan: PruningPlan) -> ImageModel:
        """Return the dense model pruned to a plan and reconstructed."""
        with seeded(self.key.seed):
            found = run(self.dense, self.splits, replace(self.settings, plan=plan)).model
        assert isinstance(found, ImageModel)
        return found

    def note(self, out: Path, tuning: Tuning, **more: object) -> None:
        """Write settings.json of a record."""
        network = self.bench.level.network(self.key.network)
        settings = {
            "images": self.key.data,
            "network": network.name,
            "ratio": self.key.ratio,
            **more,
            "threat": str(self.settings.threat),
            "tuning": asdict(tuning),
            "training": network.training,
            "dense": digest(self.dense),
            "versions": library_versions(),
            "hardware": hardware(torch.device(self.bench.device)),
        }
        write_text(out / "settings.json", json.dumps(settings, indent=1) + "\n")


def open_one(options: argparse.Namespace, seed: int) -> One:
    """Open data and dense model; train it where the cache has none."""

    def tell(line: str) -> None:
        print(line, flush=True)

    level = LEVELS[options.level]
    bench = Bench(level, options.data, options.cache, options.device, tell)
    key = Key(options.images, options.network, level.methods[0], options.ratio, OURS, LONG, seed)
    splits = bench.splits(level.images(key.data))
    return One(bench, key, splits, bench.dense(key, splits, level.network(key.network)))


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of what such benchmarks have in common."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--level", choices=sorted(LEVELS), default="cpu")
    parser.add_argument("--images", default="cifar10", help="data set of the level")
    parser.add_argument("--network", default="plain", help="network of the level")
    parser.add_argument("--ratio", type=float, default=0.75, help="of the multiply-adds, removed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", type=Path, help="folder of data sets by name")
    parser.add_argument("--cache", type=Path, default=CACHE / "matrix")
    parser.add_argument("--out", type=Path, help="folder of the record; default a temporary one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--summary", action="store_true", help="only print what is recorded")
    return parser
