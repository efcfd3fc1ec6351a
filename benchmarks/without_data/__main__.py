"""How much robustness a model keeps that is pruned without its data.

    python -m benchmarks.without_data --data DIR --weights DIR --out RECORD

DIR of --data holds image folders by name (cifar10, tiny-imagenet-20), that of --weights the files
that networks start from; a network without one is trained first and kept in --cache. Every model
measured is a line of OUT/cells.jsonl, and a run that stops is taken up where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.criteria import peers
from benchmarks.criteria.dense import CACHE, dense_model, digest
from benchmarks.criteria.peers import Peer, prune
from benchmarks.without_data.cells import Cell, paired_table, points, read, short_table, table
from benchmarks.without_data.networks import SUBJECTS, Subject
from benchmarks.without_data.variants import VARIANTS
from robust_prune.adversaries import adversarial_set, pgd_correct
from robust_prune.data import DataSplits, from_iterable, open_data
from robust_prune.models import library_versions
from robust_prune.modules import ImageModel, predict, seeded
from robust_prune.pipeline import Settings, hardware, run
from robust_prune.repair import recalibrate_batchnorm_
from robust_prune.types import Budget

TRAINING_IMAGES = 1000
PEER_IMAGES = 512  # that torch-pruning's criteria take gradients on
PEERS = {peer.name: peer for peer in peers.PEERS}
STEPS = 20


@dataclass(frozen=True)
class Bench:
    """A robust model with its images, and the test images that all arms share."""

    subject: Subject
    model: ImageModel
    splits: DataSplits
    images: Tensor
    labels: Tensor

    def measure(self, arm: str, ratio: float, seed: int) -> Cell:
        """Prune by an arm and attack what is left, without any fine-tuning."""
        start = time.perf_counter()
        name, threat = self.subject.network.name, self.subject.threat
        model = self.model
        if arm in PEERS:
            model = self._by_torch_pruning(PEERS[arm], ratio, seed)
        elif arm != "dense":
            settings = Settings(budget=Budget("macs", ratio), threat=threat, seed=seed)
            model = run(self.model, self._images_of(arm, seed), settings).model  # type: ignore[assignment]
        seconds = time.perf_counter() - start
        pgd = pgd_correct(model, self.images, self.labels, threat=threat, steps=STEPS, seed=0)
        clean = predict(model, self.images) == self.labels
        return Cell(name, arm, ratio, seed, bits(pgd), bits(clean), round(seconds, 1))

    def _by_torch_pruning(self, peer: Peer, ratio: float, seed: int) -> ImageModel:
        """Prune by a criterion of torch-pruning's that has the data, and renew batch norms."""
        images, labels = self.splits.train.take(PEER_IMAGES, seed)
        attacked = adversarial_set(
            self.model, images, labels, threat=self.subject.threat, seed=seed
        )
        size = self.splits.input_size
        with seeded(seed):
            model = prune(self.model, peer, ratio, size, attacked, images, seed)
        recalibrate_batchnorm_(model, self.splits.train.batches(64, seed=seed, limit=2048))
        return model

    def _images_of(self, arm: str, seed: int) -> DataSplits | None:
        """Return what an arm sees; None for what `compress` does without data."""
        images, labels = self.splits.train.take(TRAINING_IMAGES, seed)
        if arm == "stand-ins":
            return None
        if arm == "data":
            return from_iterable((images, labels))
        if arm == "unlabelled":
            return from_iterable(images, labeller=self.model)
        return VARIANTS[arm](self.model, self.splits.input_size, seed)


def bits(verdicts: Tensor) -> str:
    """Return verdicts as a string of 0 and 1."""
    return "".join("01"[int(v)] for v in verdicts)


def open_bench(subject: Subject, options: argparse.Namespace, tell: Callable[[str], None]) -> Bench:
    """Open the images, and the dense model or train it."""
    name = subject.data if subject.data == "digits" else str(options.data / subject.data)
    splits = open_data(name, input_size=subject.size, workers=0)
    network = subject.network
    known = options.weights / network.warm if options.weights and network.warm else None
    if known is not None and known.exists():
        model = network.create(splits.classes, subject.size)
        model.net.load_state_dict(torch.load(known, weights_only=True))
        model.eval()
    else:
        model, _ = dense_model(network, splits, subject.threat, options.cache, None, "cpu", tell)
    assert splits.test is not None
    images, labels = splits.test.take(min(options.n, len(splits.test)), 0)
    return Bench(subject, model, splits, images, labels)


def main() -> None:
    """Measure what is missing, and print the table."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    cells_path = options.out / "cells.jsonl"
    log = (options.out / "log.txt").open("a")

    def tell(line: str) -> None:
        for stream in (sys.stdout, log):
            print(line, file=stream, flush=True)

    for name in options.networks:
        bench = open_bench(SUBJECTS[name], options, tell)
        _note_settings(options, name, bench)
        done = {cell.key for cell in read(cells_path)}
        for seed in options.seeds:
            for ratio in options.ratios:
                for arm in options.arms:
                    if (name, arm, ratio, seed) in done:
                        continue
                    cell = bench.measure(arm, ratio, seed)
                    with cells_path.open("a") as file:
                        file.write(json.dumps(asdict(cell)) + "\n")
                    robust = 100 * cell.pgd.count("1") / len(cell.pgd)
                    tell(f"{name} {arm} {ratio} seed {seed}: PGD-20 {robust:.1f}")
    cells = list(read(cells_path))
    half, beyond = points(cells, beyond_half=False), points(cells, beyond_half=True)
    text = (
        f"{table(cells)}\n{short_table(cells)}\n{paired_table(cells)}\n"
        f"The most that stand-ins cost: {half} points up to half, {beyond} beyond.\n"
    )
    (options.out / "summary.md").write_text(text)
    print(text)


def _note_settings(options: argparse.Namespace, name: str, bench: Bench) -> None:
    path = options.out / "settings.json"
    known = json.loads(path.read_text()) if path.exists() else {"dense": {}}
    known |= {
        "test_images": options.n,
        "training_images": TRAINING_IMAGES,
        "versions": library_versions(),
        "hardware": hardware(torch.device("cpu")),
    }
    known["dense"][name] = {
        "digest": digest(bench.model),
        "threat": str(bench.subject.threat),
        "training": bench.subject.network.training,
    }
    path.write_text(json.dumps(known, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(), help="folder of image folders")
    parser.add_argument("--weights", type=Path, help="folder of weights to take as they are")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where trained models are kept")
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument("--networks", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    arms = ["dense", "data", "unlabelled", "stand-ins", *VARIANTS, *PEERS]
    parser.add_argument("--arms", nargs="+", default=["data", "stand-ins"], choices=arms)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.75])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--n", type=int, default=1000, help="test images")
    return parser.parse_args()


if __name__ == "__main__":
    main()
