"""Which criterion loses least robustness at the same cost.

    python -m benchmarks.criteria --level smoke
    python -m benchmarks.criteria --level cpu --data DIR [--warm DIR] --out RECORD

Dense models are trained first and kept in --cache. A run that stops is taken up where it was:
every model measured is a line of OUT/cells.jsonl. --network measures one network alone, so that
several processes can share the work; --stage one stage alone, which must find the cells that its
finalists are chosen from.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.criteria import estimators, protocol, summary
from benchmarks.criteria.dense import CACHE, check_same, dense_model
from benchmarks.criteria.levels import LEVELS, Level
from benchmarks.data_sets import open_named
from robust_prune.data import DataSplits, open_data
from robust_prune.errors import RobustPruneError
from robust_prune.models import library_versions
from robust_prune.pipeline import hardware


def main() -> None:
    """Run a level, or what is left of it, and print its tables."""
    options = _options()
    level = LEVELS[options.level]
    out: Path = options.out or Path(tempfile.mkdtemp(prefix="criteria-"))
    out.mkdir(parents=True, exist_ok=True)
    if not options.summary:
        _run(level, options, out)
    cells = [c for path in sorted(out.glob("cells*.jsonl")) for c in protocol.read(path)]
    text = "\n".join(
        (
            summary.tables(cells),
            "## Against the torch-pruning arm that was best before fine-tuning\n",
            summary.targets(cells),
            estimators.table(out),
            estimators.efforts(out),
        )
    )
    (out / "summary.md").write_text(text)
    summary.plot(cells, out / "robustness.png")
    print(text)
    print(f"wrote {out}/summary.md and robustness.png")


def _run(level: Level, options: argparse.Namespace, out: Path) -> None:
    tag = f"-{options.network}" if options.network else ""
    log = (out / f"log{tag}.txt").open("a")

    def tell(line: str) -> None:
        for stream in (sys.stdout, log):
            print(line, file=stream, flush=True)

    settings: dict[str, Any] = {
        "level": options.level,
        "threat": str(level.threat),
        "calibration_images": level.calibration_images,
        "stages": [asdict(stage) for stage in level.stages],
        "versions": library_versions(),
        "hardware": hardware(torch.device(options.device)),
        "dense": {},
    }
    for source in level.data:
        splits = _opened(source, options, level, tell)
        if splits is None:
            continue
        for network in level.networks:
            if options.network not in ("", network.name):
                continue
            model, trained = dense_model(
                network, splits, level.threat, options.cache, options.warm, options.device, tell
            )
            label = network.name if len(level.data) == 1 else f"{network.name}/{splits.name}"
            path = out / f"settings{tag}.json"
            check_same(path, label, trained["digest"])
            settings["dense"][label] = trained
            path.write_text(json.dumps(settings, indent=1) + "\n")
            bench = protocol.Bench(
                label, model, splits, level.threat, level.calibration_images, level.batch_size
            )
            estimators.run(bench, out, level.estimator_images, tell)
            estimators.run_effort(bench, out, tell)
            stages = [s for s in level.stages if options.stage in ("", s.name)]
            protocol.run(bench, stages, out / f"cells{tag}.jsonl", tell)


def _opened(
    source: str | None, options: argparse.Namespace, level: Level, tell: Callable[[str], None]
) -> DataSplits | None:
    """Open the folder of --data, or a data set by its name; None if it is not there, and said.

    Raises:
        RobustPruneError: the folder of --data holds no data.
    """
    if source is None and options.data is None:
        tell("no --data folder: that data set is left out")
        return None
    if source is None:
        return open_data(options.data, input_size=level.size)
    try:
        return open_named(source, options.root, level.size)
    except RobustPruneError as error:
        tell(f"{source} is left out: {error}")
        return None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--level", choices=sorted(LEVELS), default="smoke")
    parser.add_argument("--data", help="image folder for levels whose data has no name")
    parser.add_argument("--root", type=Path, help="folder of data sets by name")
    parser.add_argument("--warm", type=Path, help="folder of weights to start training from")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where dense models are kept")
    parser.add_argument("--out", type=Path, help="folder of the record; default a temporary one")
    parser.add_argument("--network", default="", help="measure this network alone")
    parser.add_argument("--stage", default="", help="measure this stage alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--summary", action="store_true", help="only print what is recorded")
    return parser.parse_args()


if __name__ == "__main__":
    main()
