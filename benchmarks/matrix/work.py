"""Measuring one cell: train or load the dense model, prune, tune, attack."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.criteria import peers
from benchmarks.criteria.dense import dense_model, digest, where_native
from benchmarks.criteria.networks import Network
from benchmarks.criteria.protocol import BATCHNORM_IMAGES, verdicts
from benchmarks.data_sets import open_named
from benchmarks.matrix.cells import Cell
from benchmarks.matrix.levels import DENSE, Images, Key, Level, Tuning
from robust_prune.adversaries import adversarial_set
from robust_prune.allocation import log_capacity
from robust_prune.criteria import calibration_images
from robust_prune.data import DataSplits, as_split
from robust_prune.errors import RobustPruneError
from robust_prune.finetune import Method, TrainingConfig, train_
from robust_prune.graph import ModelGraph, count_cost
from robust_prune.models import open_model, save
from robust_prune.modules import ImageModel, seeded
from robust_prune.pipeline import Settings, run
from robust_prune.repair import recalibrate_batchnorm_
from robust_prune.types import Budget


@dataclass(frozen=True)
class Bench:
    """Where data and trained models lie, and what tells of progress."""

    level: Level
    data: Path | None
    cache: Path
    device: str
    tell: Callable[[str], None]

    def splits(self, images: Images) -> DataSplits:
        """Open a data set of --data, or as much of it as the level takes."""
        splits = open_named(images.name, self.data, images.size)
        n = self.level.train_images
        if not n:
            return splits
        assert splits.validation is not None
        train, validation = (
            as_split([part.take(min(n, len(part)), 0)])
            for part in (splits.train, splits.validation)
        )
        return replace(splits, train=train, validation=validation)

    def dense(self, key: Key, splits: DataSplits, network: Network) -> ImageModel:
        """Return the robust dense model, trained by the method that tunes its pruned ones."""
        epochs = network.training["epochs"] * self.level.images(key.data).passes
        trained = {**network.training, "epochs": epochs, "method": key.method}
        named = replace(network, name=f"{network.name}-{key.method}", training=trained)
        args = named, splits, self.level.threat(key), self.cache, None, self.device, self.tell
        return dense_model(*args)[0]


def measure(bench: Bench, key: Key) -> Cell:
    """Prune, tune and attack one model; what an arm raises is its result.

    Raises:
        RobustPruneError: there is no such data.
    """
    level = bench.level
    threat, tuning = level.threat(key), level.tuning(key.tuning)
    splits = bench.splits(level.images(key.data))
    dense = bench.dense(key, splits, level.network(key.network))
    start = time.process_time()
    empty = Cell(key, str(threat), dense=digest(dense))
    try:
        with seeded(key.seed):
            model = pruned(bench, key, dense, splits)
    except RobustPruneError as error:
        return replace(empty, error=str(error))
    told = tune_(bench, key, tuning, model, splits) if tuning.epochs else empty
    assert splits.test is not None
    size = splits.input_size
    found = verdicts(model, splits.test, level.test_images, threat, "pgd")
    if tuning.autoattack:
        path = _kept(bench, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(model, path)
    graph = ModelGraph(model, size, probe=False)
    cost = count_cost(model, size)
    return replace(
        told,
        key=key,
        threat=empty.threat,
        dense=empty.dense,
        macs=cost.macs,
        params=cost.params,
        widths=tuple(group.width for group in graph.groups),
        log_capacity=log_capacity(graph.layers({})),
        clean=found["clean"],
        pgd=found["pgd"],
        cpu_seconds=round(time.process_time() - start, 1),
    )


def judge(bench: Bench, cell: Cell) -> Cell:
    """Attack a measured model, kept since then, by AutoAttack."""
    key, level = cell.key, bench.level
    splits = bench.splits(level.images(key.data))
    start = time.process_time()
    model = _opened(bench, key, splits, _kept(bench, key))
    assert splits.test is not None
    n = level.tuning(key.tuning).autoattack
    found = verdicts(model, splits.test, n, level.threat(key), "autoattack", only=True)
    seconds = round(cell.cpu_seconds + time.process_time() - start, 1)
    return replace(cell, autoattack=found["autoattack"], cpu_seconds=seconds)


def pruned(bench: Bench, key: Key, dense: ImageModel, splits: DataSplits) -> ImageModel:
    """Return the model of an arm, not tuned; kept, so that no fine-tuning prunes it again."""
    if key.arm == DENSE:
        return dense
    name = f"{digest(dense)}-{100 * key.ratio:g}-{key.arm}-{key.seed}.safetensors"
    path = bench.cache / "pruned" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save(_prune(bench, key, dense, splits), path)
    return _opened(bench, key, splits, path)


def _kept(bench: Bench, key: Key) -> Path:
    return bench.cache / "tuned" / f"{key.label}.safetensors"


def _opened(bench: Bench, key: Key, splits: DataSplits, path: Path) -> ImageModel:
    network = bench.level.network(key.network)
    loaded, _ = open_model(path, model=network.create(splits.classes, splits.input_size))
    assert isinstance(loaded, ImageModel)
    return loaded.to(bench.device)


def _prune(bench: Bench, key: Key, dense: ImageModel, splits: DataSplits) -> ImageModel:
    level, threat = bench.level, bench.level.threat(key)
    peer = next((p for p in peers.PEERS if p.name == key.arm), None)
    if peer is None:
        allocation, _, score = key.arm.rpartition("-")
        settings = Settings(
            budget=Budget("macs", key.ratio),
            threat=threat,
            seed=key.seed,
            allocation=allocation,
            score=score,
            calibration_images=level.calibration_images,
            batch_size=level.batch_size,
        )
        model = run(dense, splits, settings).model
        assert isinstance(model, ImageModel)
        return model
    images, labels = calibration_images(dense, splits, level.calibration_images, key.seed)
    attacked = adversarial_set(dense, images, labels, threat=threat, seed=key.seed)
    size = splits.input_size
    model = peers.prune(dense, peer, key.ratio, size, attacked, images, key.seed, our_graph=True)
    batches = splits.train.batches(level.batch_size, seed=key.seed, limit=BATCHNORM_IMAGES)
    recalibrate_batchnorm_(model, batches)
    return model


def tune_(
    bench: Bench,
    key: Key,
    tuning: Tuning,
    model: ImageModel,
    splits: DataSplits,
    *,
    method: str | Method = "",
    teacher: ImageModel | None = None,
) -> Cell:
    """Fine-tune in place by the recipe that `compress` has: a constant rate, averaged weights.

    `method` is another than the cell's, `teacher` what it learns from.
    """
    train, validation = splits.train, splits.validation
    assert validation is not None
    if tuning.images:
        train = as_split([train.take(tuning.images, key.seed)])
    config = TrainingConfig(
        method=method or key.method,
        epochs=tuning.epochs,
        threat=bench.level.threat(key),
        attack_steps=tuning.steps,
        lr=rate_of(bench, key, tuning),
        ema=0.999,
        schedule="constant",
        amp=True,
        batch_size=bench.level.batch_size,
        seed=key.seed,
    )
    config = where_native(config, bench.device)
    history = train_(model, train, validation, config, teacher=teacher)
    best = history.epochs[history.best_epoch] if history.epochs else None
    return Cell(
        key,
        validation=best.robust if best else 0.0,
        best_epoch=history.best_epoch,
        notes=tuple(history.notes),
    )


def rate_of(bench: Bench, key: Key, tuning: Tuning) -> float:
    """Return the learning rate, at most what the dense model was trained with.

    More undoes a network without batch norm.
    """
    trained: float = bench.level.network(key.network).training.get("lr", tuning.lr)
    return min(tuning.lr, trained)
