"""What is measured: arms, stages, and the cells of the record, one JSON line each."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from benchmarks.criteria import peers
from benchmarks.criteria.dense import where_native
from robust_prune import evaluation, pipeline
from robust_prune.adversaries import AdversarialSet, adversarial_set
from robust_prune.criteria import calibration_images
from robust_prune.data import DataSplits, Split, as_split
from robust_prune.errors import RobustPruneError
from robust_prune.finetune import TrainingConfig, train_
from robust_prune.graph import count_cost
from robust_prune.modules import ImageModel, device_of, seeded
from robust_prune.pipeline import Settings
from robust_prune.repair import recalibrate_batchnorm_
from robust_prune.types import Budget, ThreatModel

BATCHNORM_IMAGES = 2048
BEST = "curve-l2"  # what `compress` does by default
OURS = {
    f"{rule}-{score}": {"allocation": rule, "score": score}
    for rule in ("curve", "uniform", "mrs", "inverted")
    for score in ("l2", "taylor")
}
WITHOUT_FIT = "-unfitted"  # the same plan without the reconstruction
OURS |= {
    f"curve-{score}": {"allocation": "curve", "score": score}
    for score in ("fisher", "reconstruction")
}
PLAIN = {
    f"{rule}{WITHOUT_FIT}": {**OURS[rule], "reconstruct": False}
    for rule in ("curve-l2", "uniform-l2", "mrs-l2")
}
ARMS = ("dense", *(p.name for p in peers.PEERS), *OURS, *PLAIN)


@dataclass(frozen=True)
class Tuning:
    """Fine-tuning, the same for every arm; `images` 0 means all."""

    epochs: int
    images: int = 0
    steps: int = 2
    lr: float = 0.02
    amp: bool = False


@dataclass(frozen=True)
class Stage:
    """One part of a level: which arms are tuned and measured how.

    `finalists` runs, beside `arms`, the best torch-pruning arms of an earlier stage, by robust
    accuracy, each cell for itself.
    """

    name: str
    ratios: tuple[float, ...]
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    n: int
    tuning: Tuning | None = None
    autoattack: int = 0
    finalists: int = 0
    judged_by: str = ""


@dataclass(frozen=True)
class Cell:
    """One model measured. Verdicts are strings of 0 and 1, one per test image."""

    network: str
    stage: str
    arm: str
    ratio: float
    seed: int
    macs: int = 0
    params: int = 0
    clean: str = ""
    pgd: str = ""
    autoattack: str = ""
    seconds: float = 0.0
    prune_seconds: float = 0.0
    error: str = ""

    @property
    def key(self) -> tuple[str, str, str, float, int]:
        """What makes a cell the same when a run is taken up again."""
        return self.network, self.stage, self.arm, self.ratio, self.seed


@dataclass(frozen=True)
class Bench:
    """A dense robust model and the data that every arm of it shares."""

    network: str
    model: ImageModel
    splits: DataSplits
    threat: ThreatModel
    calibration_images: int
    batch_size: int
    # later stages tune the same models
    _models: dict[tuple[str, float, int], ImageModel] = field(default_factory=dict)
    _peer_images: dict[int, tuple[AdversarialSet, Tensor]] = field(default_factory=dict)

    def pruned(self, arm: str, ratio: float, seed: int) -> ImageModel:
        """Return the arm's model with recalibrated batch norm, not fine-tuned."""
        if arm == "dense":
            return copy.deepcopy(self.model)
        key = arm, ratio, seed
        if key not in self._models:
            self._models[key] = self._prune(arm, ratio, seed)
        return copy.deepcopy(self._models[key])

    def _prune(self, arm: str, ratio: float, seed: int) -> ImageModel:
        peer = next((p for p in peers.PEERS if p.name == arm), None)
        if peer is None:
            options = {**OURS, **PLAIN}[arm]
            settings = Settings(
                budget=Budget("macs", ratio),
                threat=self.threat,
                seed=seed,
                calibration_images=self.calibration_images,
                batch_size=self.batch_size,
                **options,  # type: ignore[arg-type]
            )
            model = pipeline.run(self.model, self.splits, settings).model
            assert isinstance(model, ImageModel)
            return model
        adversarial, clean = self._peer_batches(seed)
        size = self.splits.input_size
        model = peers.prune(self.model, peer, ratio, size, adversarial, clean, seed)
        recalibrate_batchnorm_(
            model,
            self.splits.train.batches(self.batch_size, seed=seed, limit=BATCHNORM_IMAGES),
        )
        return model

    def _peer_batches(self, seed: int) -> tuple[AdversarialSet, Tensor]:
        if seed not in self._peer_images:
            n = self.calibration_images
            images, labels = calibration_images(self.model, self.splits, n, seed)
            self._peer_images[seed] = (
                adversarial_set(self.model, images, labels, threat=self.threat, seed=seed),
                images,
            )
        return self._peer_images[seed]

    def tune_(self, model: ImageModel, tuning: Tuning, seed: int) -> None:
        """Fine-tune by PGD-AT; the epoch that validation chooses stays, as in `compress`."""
        train, validation = self.splits.train, self.splits.validation
        assert validation is not None
        if tuning.images:
            train = as_split([train.take(tuning.images, seed)])
        config = TrainingConfig(
            method="pgd-at",
            epochs=tuning.epochs,
            threat=self.threat,
            attack_steps=tuning.steps,
            lr=tuning.lr,
            amp=tuning.amp,
            batch_size=self.batch_size,
            seed=seed,
        )
        train_(model, train, validation, where_native(config, device_of(model)))


def measure(bench: Bench, stage: Stage, arm: str, ratio: float, seed: int) -> Cell:
    """Prune, tune and attack; whatever an arm raises is its result."""
    start = time.perf_counter()
    cell = Cell(bench.network, stage.name, arm, ratio, seed)
    try:
        with seeded(seed):
            model = bench.pruned(arm, ratio, seed)
    except RobustPruneError as error:
        return replace(cell, error=str(error), seconds=time.perf_counter() - start)
    prune_seconds = time.perf_counter() - start
    if stage.tuning is not None:
        bench.tune_(model, stage.tuning, seed)
    assert bench.splits.test is not None
    cost = count_cost(model, bench.splits.input_size)
    found = verdicts(model, bench.splits.test, stage.n, bench.threat, "pgd")
    if stage.autoattack:
        found |= verdicts(
            model, bench.splits.test, stage.autoattack, bench.threat, "autoattack", only=True
        )
    return replace(
        cell,
        macs=cost.macs,
        params=cost.params,
        clean=found["clean"],
        pgd=found["pgd"],
        autoattack=found.get("autoattack", ""),
        seconds=time.perf_counter() - start,
        prune_seconds=prune_seconds,
    )


def verdicts(
    model: nn.Module,
    test: Split,
    n: int,
    threat: ThreatModel,
    attack: evaluation.Attack,
    *,
    only: bool = False,
) -> dict[str, str]:
    """Return verdicts by attack; the images are the same for every arm, whatever its seed."""
    found = evaluation.evaluate(
        model, evaluation.draw(test, n, 0), threat=threat, attack=attack, seed=0
    )
    return {
        m.attack: "".join("01"[right] for right in m.correct)
        for m in found.measurements
        if not only or m.attack == attack
    }


def cells_of(stage: Stage, done: Sequence[Cell]) -> Iterator[tuple[str, float, int]]:
    """Yield (arm, ratio, seed) of a stage; the dense model has ratio 0 and the first seed."""
    for ratio in stage.ratios:
        arms = [arm for arm in stage.arms if arm != "dense"]
        judged = [
            c
            for c in done
            if c.stage == stage.judged_by and c.ratio == ratio and c.arm.startswith("tp-")
        ]
        robust: dict[str, list[float]] = {}
        for c in judged:
            robust.setdefault(c.arm, []).append(0.0 if c.error else percent(c.pgd))
        best = sorted(robust, key=lambda arm: -statistics.mean(robust[arm]))[: stage.finalists]
        for arm in dict.fromkeys((*arms, *best)):
            for seed in stage.seeds:
                yield arm, ratio, seed
    if "dense" in stage.arms:
        yield "dense", 0.0, stage.seeds[0]


def run(bench: Bench, stages: Sequence[Stage], path: Path, tell: Callable[[str], None]) -> None:
    """Measure all cells that `path` does not hold yet, and add them to it line by line."""
    done = [c for c in read(path) if c.network == bench.network]
    for stage in stages:
        for arm, ratio, seed in list(cells_of(stage, done)):
            if any(c.key == (bench.network, stage.name, arm, ratio, seed) for c in done):
                continue
            cell = measure(bench, stage, arm, ratio, seed)
            done.append(cell)
            with path.open("a") as file:
                file.write(json.dumps(asdict(cell)) + "\n")
            tell(describe(cell))


def read(path: Path) -> list[Cell]:
    """Return the cells measured so far."""
    if not path.exists():
        return []
    return [Cell(**json.loads(line)) for line in path.read_text().splitlines()]


def describe(cell: Cell) -> str:
    """Return a line for the log."""
    head = f"{cell.network} {cell.stage} {cell.arm} -{100 * cell.ratio:.0f} % seed {cell.seed}:"
    if cell.error:
        return f"{head} {cell.error}"
    aa = f" AA {percent(cell.autoattack):.1f}" if cell.autoattack else ""
    return (
        f"{head} {cell.macs / 1e6:.2f} M, {cell.params:,} parameters, clean "
        f"{percent(cell.clean):.1f} PGD-20 {percent(cell.pgd):.1f}{aa}, pruned in "
        f"{cell.prune_seconds:.0f} of {cell.seconds:.0f} s"
    )


def percent(verdicts: str) -> float:
    """Return the accuracy in percent."""
    return 100 * verdicts.count("1") / max(len(verdicts), 1)
