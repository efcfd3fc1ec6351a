"""All suites one after the other: criteria, matrix, zoo and speed.

    python -m benchmarks --level smoke
    python -m benchmarks --level cpu --data DIR --out FOLDER [--only matrix] [--jobs 2]
    python -m benchmarks --index

Each suite writes to FOLDER/LEVEL/SUITE, and goes on there where it was. --data holds data sets by
name, as image folders: cifar10, cifar100, tiny-imagenet-20. A suite that fails does not keep the
next from running; the command then ends with 1. --index writes benchmarks/README.md anew, and the
tables of the README and the docs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.index import RECORDS, index
from benchmarks.published import PAGES, filled

SUITES = ("criteria", "matrix", "zoo", "speed")
FEW = ("resnet", "densenet", "mobilevit", "vision_transformer")  # families of the smoke zoo
LEVELS = ("smoke", "cpu", "gpu")


def command(suite: str, level: str, data: Path | None, out: Path, jobs: int) -> list[str]:
    """Return how a suite is called at a level, to write to `out`."""
    call = [sys.executable, "-m", f"benchmarks.{suite}", "--out", str(out)]
    if suite == "speed":
        return [*call, *(["--few"] if level == "smoke" else [])]
    if suite == "zoo":
        few = ["--engines", "ours", "--only", *FEW]
        return [*call, "--jobs", str(jobs), "--resume", *(few if level == "smoke" else [])]
    call += ["--level", level]
    if suite == "matrix":
        return [*call, "--jobs", str(jobs), *(["--data", str(data)] if data else [])]
    if data is None or level == "smoke":
        return call
    return [
        *call,
        *(["--data", str(data / "cifar10")] if level == "cpu" else ["--root", str(data)]),
    ]


def main() -> None:
    """Run the suites, and say which failed."""
    options = _options()
    if options.index:
        (RECORDS.parent / "README.md").write_text(index(RECORDS), encoding="utf-8")
        for page in PAGES:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        return
    unknown = [name for name in options.only if name not in SUITES]
    if unknown:
        raise SystemExit(f"no suite is named {unknown[0]!r}; use some of {', '.join(SUITES)}")
    if options.level == "cpu" and options.data is None:
        raise SystemExit("level cpu needs image folders: DATA=DIR, with DIR/cifar10 and others")
    failed = []
    for suite in options.only or SUITES:
        out = options.out / options.level / suite
        out.mkdir(parents=True, exist_ok=True)
        print(f"== {suite}, level {options.level}: {out}", flush=True)
        start = time.perf_counter()
        call = command(suite, options.level, options.data, out, options.jobs)
        if subprocess.run(call, check=False).returncode:
            failed.append(suite)
        print(f"== {suite}: {time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the same command goes on where it stopped")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--level", choices=LEVELS, default="smoke")
    parser.add_argument("--only", nargs="*", default=[], metavar="SUITE", help="run these alone")
    parser.add_argument("--data", type=Path, help="folder of data sets by name")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of all records")
    parser.add_argument("--jobs", type=int, default=1, help="cells and networks at once")
    parser.add_argument("--index", action="store_true", help="write the pages that records fill")
    return parser.parse_args()


if __name__ == "__main__":
    main()
