"""What is measured: pruned models, each tuned in some ways, and AutoAttack on them in blocks."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.criteria.dense import digest, where_native
from benchmarks.criteria.networks import Network
from benchmarks.criteria.protocol import ARMS, BEST, Bench, Cell, percent, verdicts
from benchmarks.finetuning.recipes import BASELINE, RECIPES, TEXTBOOK, Recipe
from robust_prune import evaluation
from robust_prune.adversaries import pgd_correct
from robust_prune.data import as_split
from robust_prune.finetune import EpochRecord, History, train_
from robust_prune.graph import count_cost
from robust_prune.models import open_model, save
from robust_prune.modules import ImageModel, device_of, seeded

RATIO = 0.75
PEER = "tp-bn-scale"  # torch-pruning's best arm before fine-tuning
EVEN = "uniform-l2"  # ours with equal shares, reconstructed
METHODS, FINAL, REACH = "methods", "final", "reach"
TEST_IMAGES = {METHODS: 2000, FINAL: 5000, REACH: 5000}
BLOCK = 250  # images of one line of AutoAttack
TIMED_BATCHES = 20
NO_TUNING = "untuned"


@dataclass(frozen=True)
class Tuned(Cell):
    """One model tuned and measured; `arm` is how it was pruned and the recipe, with a slash.

    `validation` holds verdicts of PGD-10, one per validation image. Seconds are of the one thread
    that worked, so that other work on the machine does not count.
    """

    validation: str = ""
    epochs: int = 0
    best_epoch: int = 0
    plan_cpu_seconds: float = 0.0
    tune_cpu_seconds: float = 0.0
    tune_seconds: float = 0.0
    history: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """AutoAttack's verdicts for one block of test images, the same images for every model."""

    arm: str
    seed: int
    block: int
    verdicts: str
    seconds: float
    flags: tuple[str, ...] = ()


class Workshop:
    """Prunes by `ratio` and tunes, and keeps the models in a folder, so that none is made twice."""

    def __init__(self, bench: Bench, network: Network, folder: Path, ratio: float = RATIO) -> None:
        self.bench, self.network, self.folder, self.ratio = bench, network, folder, ratio
        self.digest = digest(bench.model)
        folder.mkdir(parents=True, exist_ok=True)

    def pruned(self, arm: str, seed: int) -> tuple[ImageModel, dict[str, Any]]:
        """Return the pruned model, not tuned, and the seconds that this took."""
        if arm == "dense":
            return self.bench.pruned(arm, 0.0, seed), {"seconds": 0.0, "cpu_seconds": 0.0}

        def make() -> tuple[ImageModel, dict[str, Any]]:
            watch = Stopwatch()
            with seeded(seed):
                model = self.bench.pruned(arm, self.ratio, seed)
            return model, {"seconds": watch.seconds, "cpu_seconds": watch.cpu_seconds}

        return self._kept(f"{arm}-{seed}", make)

    def tuned(self, arm: str, name: str, seed: int) -> tuple[ImageModel, dict[str, Any]]:
        """Return the tuned model, and how it was tuned."""
        as_long_as = RECIPES[name].as_long_as if name in RECIPES else ""

        def make() -> tuple[ImageModel, dict[str, Any]]:
            model, _ = self.pruned(arm, seed)
            if name == NO_TUNING:
                return model, {"epochs": [], "best_epoch": 0, "seconds": 0.0, "cpu_seconds": 0.0}
            recipe = RECIPES[name]
            epochs = self._epochs_in_our_time(model, recipe, seed) if as_long_as else recipe.epochs
            watch = Stopwatch()
            history = self._train_(model, recipe, epochs, seed)
            return model, {
                "epochs": [measured(record) for record in history.epochs],
                "best_epoch": history.best_epoch,
                "notes": list(history.notes),
                "seconds": watch.seconds,
                "cpu_seconds": watch.cpu_seconds,
            }

        label = f"{name}-as-{as_long_as}" if as_long_as else name
        return self._kept(f"{arm}-{label}-{seed}", make)

    def _kept(
        self, name: str, make: Callable[[], tuple[ImageModel, dict[str, Any]]]
    ) -> tuple[ImageModel, dict[str, Any]]:
        if self.ratio != RATIO:
            name = f"{100 * self.ratio:g}%-{name}"
        path = self.folder / f"{self.network.name}-{self.digest}-{name}.safetensors"
        if not path.exists():
            model, told = make()
            save(model, path, {"told": told})
        spec = self.bench.model.spec
        empty = self.network.create(spec.num_classes, self.bench.splits.input_size)
        loaded, record = open_model(path, model=empty)
        assert isinstance(loaded, ImageModel)
        return loaded, record["told"]

    def _train_(
        self,
        model: ImageModel,
        recipe: Recipe,
        epochs: int,
        seed: int,
        *,
        images: int = 0,
        on_epoch: Callable[[EpochRecord], None] | None = None,
    ) -> History:
        bench = self.bench
        train, validation = bench.splits.train, bench.splits.validation
        assert validation is not None
        if images:
            train = as_split([train.take(images, seed)])
        config = recipe.config(bench.threat, bench.batch_size, epochs, seed)
        config = where_native(config, device_of(model))
        return train_(model, train, validation, config, teacher=bench.model, on_epoch=on_epoch)

    def _epochs_in_our_time(self, model: ImageModel, recipe: Recipe, seed: int) -> int:
        """Return how many epochs take as long as our planning and tuning, rounded up."""
        ours: float = self.pruned(BEST, seed)[1]["cpu_seconds"]
        ours += self.tuned(BEST, recipe.as_long_as, seed)[1]["cpu_seconds"]
        for split in (self.bench.splits.train, self.bench.splits.validation):
            assert split is not None
            split.take(len(split), seed)  # decoding the images is not training
        clock = [time.process_time()]
        images = min(TIMED_BATCHES * self.bench.batch_size, len(self.bench.splits.train))
        self._train_(
            copy.deepcopy(model),
            recipe,
            1,
            seed,
            images=images,
            on_epoch=lambda _: clock.append(time.process_time()),
        )
        validating, some = clock[1] - clock[0], clock[2] - clock[1]
        share = len(self.bench.splits.train) / images
        whole = validating + max(some - validating, 0.0) * share
        return max(1, math.ceil((ours - validating) / whole))


def measured(record: EpochRecord) -> dict[str, Any]:
    """Return an epoch's figures without those that were not measured, which are NaN."""
    return {name: value for name, value in asdict(record).items() if not math.isnan(value)}


class Stopwatch:
    """Seconds since it was made: on the wall, and of this process's own work."""

    def __init__(self) -> None:
        self._wall, self._own = time.perf_counter(), time.process_time()

    @property
    def seconds(self) -> float:
        """Seconds on the wall."""
        return time.perf_counter() - self._wall

    @property
    def cpu_seconds(self) -> float:
        """Seconds of the process's own work."""
        return time.process_time() - self._own


def measure(shop: Workshop, stage: str, arm: str, seed: int) -> Tuned:
    """Prune, tune and attack one model."""
    watch = Stopwatch()
    start, name = arm.split("/")
    plan = shop.pruned(start, seed)[1]
    model, told = shop.tuned(start, name, seed)
    bench = shop.bench
    assert bench.splits.test is not None
    assert bench.splits.validation is not None
    images, labels = bench.splits.validation.take(len(bench.splits.validation), seed=0)
    right = pgd_correct(model, images, labels, threat=bench.threat, steps=10, seed=0)
    found = verdicts(model, bench.splits.test, TEST_IMAGES[stage], bench.threat, "pgd")
    cost = count_cost(model, bench.splits.input_size)
    return Tuned(
        bench.network,
        stage,
        arm,
        0.0 if start == "dense" else shop.ratio,
        seed,
        macs=cost.macs,
        params=cost.params,
        clean=found["clean"],
        pgd=found["pgd"],
        seconds=watch.seconds,
        prune_seconds=plan["seconds"],
        validation="".join("01"[r] for r in right.tolist()),
        epochs=max(0, len(told["epochs"]) - 1),
        best_epoch=told["best_epoch"],
        plan_cpu_seconds=plan["cpu_seconds"],
        tune_cpu_seconds=told["cpu_seconds"],
        tune_seconds=told["seconds"],
        history=tuple(told["epochs"]),
        notes=tuple(told.get("notes", ())),
    )


def attack_block(shop: Workshop, arm: str, seed: int, block: int) -> Block:
    """Run AutoAttack on one block of the test images of stage `final`."""
    watch = Stopwatch()
    start, name = arm.split("/")
    model, _ = shop.tuned(start, name, seed)
    assert shop.bench.splits.test is not None
    test = evaluation.draw(shop.bench.splits.test, TEST_IMAGES[FINAL], 0)
    part = slice(block * BLOCK, (block + 1) * BLOCK)
    test = replace(test, images=test.images[part], labels=test.labels[part])
    found = evaluation.evaluate(model, test, threat=shop.bench.threat, attack="autoattack", seed=0)
    last = found.measurements[-1]
    right = "".join("01"[r] for r in last.correct)
    return Block(arm, seed, block, right, watch.seconds, tuple(last.flags))


def chosen(cells: Sequence[Tuned]) -> str:
    """Return the recipe that was best on validation images in stage `methods`.

    Robust accuracy decides, test images never do.
    """
    tried = [c for c in cells if c.stage == METHODS and c.arm != f"{BEST}/{NO_TUNING}"]
    if not tried:
        raise SystemExit(f"stage {METHODS} comes first: no recipe can be chosen yet")
    return max(tried, key=lambda c: percent(c.validation)).arm.split("/")[1]


def arms_of(stage: str, cells: Sequence[Tuned]) -> list[str]:
    """Return the arms of a stage, the most important first."""
    if stage == METHODS:
        timed = [name for name, recipe in RECIPES.items() if recipe.as_long_as]
        return [f"{BEST}/{name}" for name in (NO_TUNING, *RECIPES) if name not in timed]
    if stage == REACH:
        return [*(f"{start}/{BASELINE}" for start in (BEST, PEER, EVEN)), f"dense/{NO_TUNING}"]
    best = chosen(cells)
    return list(
        dict.fromkeys(
            (
                f"{BEST}/{BASELINE}",
                f"{BEST}/{best}",
                f"{PEER}/{BASELINE}",
                f"{PEER}/{textbook_of(best)}",
                f"dense/{BASELINE}",
                f"{PEER}/{best}",
            )
        )
    )


def textbook_of(recipe: str) -> str:
    """Return the textbook loop that may take as long as our whole run with a recipe."""
    timed = (name for name, other in RECIPES.items() if other.as_long_as == recipe)
    return next(timed, TEXTBOOK)


def is_arm(name: str) -> bool:
    """Whether a name is that of a way of pruning and of a recipe, with a slash."""
    start, _, recipe = name.partition("/")
    return start in ARMS and recipe in (NO_TUNING, *RECIPES)


def run(
    shop: Workshop,
    stage: str,
    arms: Sequence[str],
    seeds: Sequence[int],
    blocks: int,
    out: Path,
    tell: Callable[[str], None],
) -> None:
    """Measure what the record does not hold yet, seed by seed, and add it line by line."""
    for seed in seeds:
        for arm in arms:
            ratio = 0.0 if arm.startswith("dense/") else shop.ratio
            key = stage, arm, ratio, seed
            if any((c.stage, c.arm, c.ratio, c.seed) == key for c in read(out)):
                continue
            cell = measure(shop, stage, arm, seed)
            _append(out / "cells.jsonl", asdict(cell))
            tell(describe(cell))
    for block, seed, arm in _blocks(arms, seeds, blocks):
        if any((b.arm, b.seed, b.block) == (arm, seed, block) for b in read_blocks(out)):
            continue
        found = attack_block(shop, arm, seed, block)
        _append(out / "autoattack.jsonl", asdict(found))
        tell(
            f"{arm}, seed {seed}, block {block}: AutoAttack {percent(found.verdicts):.1f} % of "
            f"{len(found.verdicts)}, {found.seconds:.0f} s {' '.join(found.flags)}"
        )


def _blocks(
    arms: Sequence[str], seeds: Sequence[int], blocks: int
) -> Iterator[tuple[int, int, str]]:
    """Yield (block, seed, arm): all models on the first block, then all on the next."""
    for block in range(blocks):
        for seed in seeds:
            for arm in arms:
                yield block, seed, arm


def read(out: Path) -> list[Tuned]:
    """Return the models measured so far."""
    return [
        Tuned(**{**line, "history": tuple(line["history"]), "notes": tuple(line["notes"])})
        for line in _lines(out / "cells.jsonl")
    ]


def read_blocks(out: Path) -> list[Block]:
    """Return AutoAttack's blocks so far."""
    return [
        Block(**{**line, "flags": tuple(line["flags"])})
        for line in _lines(out / "autoattack.jsonl")
    ]


def attacked(cells: Sequence[Tuned], blocks: Sequence[Block]) -> list[Tuned]:
    """Return the cells of stage `final` with AutoAttack's verdicts.

    Of every model that was attacked, the leading blocks that all of them have count.
    """
    by_model: dict[tuple[str, int], dict[int, str]] = {}
    for b in blocks:
        by_model.setdefault((b.arm, b.seed), {})[b.block] = b.verdicts
    common = 0
    while by_model and all(common in found for found in by_model.values()):
        common += 1
    return [
        replace(c, autoattack="".join(by_model[c.arm, c.seed][i] for i in range(common)))
        if c.stage == FINAL and (c.arm, c.seed) in by_model
        else c
        for c in cells
    ]


def describe(cell: Tuned) -> str:
    """Return a line for the log."""
    return (
        f"{cell.stage} {cell.arm} -{100 * cell.ratio:g} % seed {cell.seed}: "
        f"{cell.macs / 1e6:.2f} M, {cell.params:,} parameters, "
        f"validation PGD-10 {percent(cell.validation):.1f}, clean {percent(cell.clean):.1f} "
        f"PGD-20 {percent(cell.pgd):.1f} of {len(cell.pgd)}, best epoch {cell.best_epoch} of "
        f"{cell.epochs}, planned in {cell.plan_cpu_seconds:.0f} and tuned in "
        f"{cell.tune_cpu_seconds:.0f} s of one core"
    )


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
