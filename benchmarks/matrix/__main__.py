"""The whole matrix: data x networks x methods x shares x arms x fine-tuning x seeds.

    python -m benchmarks.matrix --level smoke
    python -m benchmarks.matrix --level cpu --data DIR --out RECORD [--only resnet10 0.75]
    python -m benchmarks.matrix --level gpu --data DIR --out RECORD
    python -m benchmarks.matrix --level gpu --data DIR --cut 32 --only svhn resnet18 0.75 seed=0

Every cell is a process of its own and a file of OUT/cells; a run that stops is taken up where it
was, and cells whose data are not there are named and left out. --data holds data sets by name
(image folders, or what torchvision reads). --jobs cells are measured at once, each on its own
GPU where there are several. --only keeps the cells that have all these words: data, network,
method, share, arm, tuning, seed=0. Dense models are trained first and kept in --cache.
--cut N tries whether all of it runs: N images, one epoch of one step. Its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.criteria.dense import CACHE
from benchmarks.criteria.protocol import percent
from benchmarks.matrix import cells, summary
from benchmarks.matrix.drawing import draw
from benchmarks.matrix.levels import DENSE, LEVELS, UNTUNED, Key, Level
from benchmarks.matrix.work import Bench, judge, measure
from robust_prune.errors import RobustPruneError
from robust_prune.models import library_versions
from robust_prune.pipeline import hardware

TRAIN, MEASURE, JUDGE = "train", "measure", "judge"  # what a process is asked for


def main() -> None:
    """Measure what is missing, and print the tables; a child measures one cell."""
    options = _options()
    level = LEVELS[options.level]
    if options.cut:
        level = level.cut(options.cut)
    out: Path = options.out or Path(tempfile.mkdtemp(prefix="matrix-"))
    if options.cell:
        _child(level, options, out)
        return
    out.mkdir(parents=True, exist_ok=True)
    if not options.summary:
        _parent(level, options, out)
    text = summary.tables(cells.read(out))
    if options.cut:
        text = f"Cut down to {options.cut} images and one epoch: no results.\n\n{text}"
    (out / "summary.md").write_text(text)
    draw(cells.read(out), out / "matrix.png")
    print(text)
    print(f"wrote {out}/summary.md and matrix.png")


def _parent(level: Level, options: argparse.Namespace, out: Path) -> None:
    log = (out / "log.txt").open("a")

    def tell(line: str) -> None:
        for stream in (sys.stdout, log):
            print(line, file=stream, flush=True)

    _note_settings(level, options, out)
    hoped = dict.fromkeys(level.blocks(), level.screened)  # which of them are tuned is seen later
    keys = _asked(level.cells(hoped), options.only)
    blocks = {(k.data, k.network, k.method, k.ratio) for k in keys}
    screens = [k for k in level.screens() if (k.data, k.network, k.method, k.ratio) in blocks]
    keys = [*screens, *keys]
    tell(f"{options.level}: at most {len(cells.missing(out, keys))} cells to measure")
    start = Key("", "", "", 0.0, DENSE, UNTUNED, level.seeds[0])
    trained = dict.fromkeys(
        replace(start, data=k.data, network=k.network, method=k.method) for k in keys
    )
    able = _all(list(trained), options, out, tell, TRAIN)
    there = {(k.data, k.network, k.method) for k in able}
    screens = [k for k in screens if (k.data, k.network, k.method) in there]
    _all(cells.missing(out, screens), options, out, tell)
    best = cells.finalists(cells.read(out), level.finalists)
    asked = _asked(level.cells(best), options.only)
    asked = [k for k in asked if (k.data, k.network, k.method) in there]
    _all(cells.missing(out, asked), options, out, tell)
    measured = [c for c in cells.read(out) if c.key in set(asked)]
    if not options.no_autoattack:
        judged = [c.key for c in summary.claims(measured, level.claimed) if not c.autoattack]
        judged = [k for k in judged if level.tuning(k.tuning).autoattack]
        _all(judged, options, out, tell, JUDGE)
    left = cells.missing(out, asked)
    tell(f"{len(cells.read(out))} cells measured, {len(left)} left")


def _all(
    keys: Sequence[Key],
    options: argparse.Namespace,
    out: Path,
    tell: Callable[[str], None],
    what: str = MEASURE,
) -> list[Key]:
    """Run a process for each, several at once; return those that ended well."""
    devices: queue.Queue[str] = queue.Queue()
    for i in range(options.jobs):
        several = options.device == "cuda" and torch.cuda.device_count() > 1
        devices.put(f"cuda:{i % torch.cuda.device_count()}" if several else options.device)
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))

    def one(key: Key) -> Key | None:
        device = devices.get()
        command = [sys.executable, "-m", "benchmarks.matrix", "--level", options.level]
        command += ["--cell", json.dumps(asdict(key)), "--what", what, "--device", device]
        command += ["--out", str(out), "--cache", str(options.cache)]
        command += ["--cut", str(options.cut)] if options.cut else []
        command += ["--data", str(options.data)] if options.data else []
        env = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONUNBUFFERED": "1"}
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                command, text=True, stdout=subprocess.PIPE, stderr=errors, env=env
            ) as child,
        ):
            assert child.stdout is not None
            for line in child.stdout:
                tell(line.rstrip())
            if child.wait():
                errors.seek(0)
                told = errors.read().strip().splitlines()
                tell(f"{key.label}: not measured: {told[-1] if told else child.returncode}")
        devices.put(device)
        return None if child.returncode else key

    with ThreadPoolExecutor(options.jobs) as pool:
        return [key for key in pool.map(one, keys) if key is not None]


def _child(level: Level, options: argparse.Namespace, out: Path) -> None:
    key = Key(**json.loads(options.cell))
    cache = options.cache / f"cut-{options.cut}" if options.cut else options.cache
    bench = Bench(level, options.data, cache, options.device, print)
    try:
        if options.what == TRAIN:
            bench.dense(key, bench.splits(level.images(key.data)), level.network(key.network))
            return
        judging = options.what == JUDGE
        cell = judge(bench, cells.read_one(out, key)) if judging else measure(bench, key)
    except RobustPruneError as error:
        raise SystemExit(str(error)) from None
    cells.write(out, cell)
    print(f"{key.label}: {_told(cell)}")


def _told(cell: cells.Cell) -> str:
    if cell.error:
        return cell.error
    found = {attack: getattr(cell, attack) for attack in summary.ATTACKS}
    shares = (f"{name} {percent(v):.1f} of {len(v)}" for name, v in found.items() if v)
    return (
        f"{cell.macs / 1e6:.2f} M, {cell.params:,} parameters, {', '.join(shares)}, "
        f"{cell.cpu_seconds:.0f} s of the processor"
    )


def _asked(keys: Iterable[Key], words: Sequence[str]) -> list[Key]:
    """Return the cells that have all words; the dense model belongs to every share."""

    def has(key: Key, word: str) -> bool:
        if word.replace(".", "", 1).isdigit():
            return key.arm == DENSE or float(word) == key.ratio
        return word in (
            *(key.data, key.network, key.method, key.arm, key.tuning),
            f"seed={key.seed}",
        )

    return [key for key in keys if all(has(key, word) for word in words)]


def _note_settings(level: Level, options: argparse.Namespace, out: Path) -> None:
    plain = {name: value for name, value in asdict(level).items() if name != "networks"}
    settings: dict[str, Any] = {
        "level": options.level,
        "cut": options.cut,
        "matrix": json.loads(json.dumps(plain, default=str)),
        "training": {n.name: n.training for n in level.networks},
        "versions": library_versions(),
        "hardware": hardware(torch.device(options.device)),
    }
    (out / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--level", choices=sorted(LEVELS), default="smoke")
    parser.add_argument("--data", type=Path, help="folder of data sets by name")
    parser.add_argument(
        "--cache", type=Path, default=CACHE / "matrix", help="where models are kept"
    )
    parser.add_argument("--out", type=Path, help="folder of the record; default a temporary one")
    parser.add_argument("--jobs", type=int, default=1, help="cells measured at once")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="cells with all words"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cut", type=int, default=0, metavar="N", help="try it on N images")
    parser.add_argument("--no-autoattack", action="store_true", help="leave it for another run")
    parser.add_argument("--summary", action="store_true", help="only print what is recorded")
    parser.add_argument("--cell", default="", help=argparse.SUPPRESS)
    parser.add_argument("--what", default=MEASURE, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
