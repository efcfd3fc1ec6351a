"""torch-pruning's own tests, with this package's graph in place of theirs.

    python -m benchmarks.torch_pruning_suite CHECKOUT --out benchmarks/records/torch_pruning_suite

CHECKOUT is a clone of torch-pruning; its tests run against the torch-pruning that is installed,
each file in a process of its own, first alone and then on our graph. As theirs does, it then
offers the network's outputs too, and leaves the network in eval mode, which some tests count on.
Tests that download weights fail in both where there is no network. What `READ_FIRST.md` in the
folder says is put before the table.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RESULTS, OURS = "SUITE_RESULTS", "SUITE_ON_OUR_GRAPH"
LIMIT_S = 600


@pytest.fixture(scope="session", autouse=True)
def our_graph() -> Iterator[None]:
    """As a plugin: put our graph in the place of torch-pruning's, where it is asked for."""
    with contextlib.ExitStack() as stack:
        if os.environ.get(OURS):
            _replace(stack)
        yield


def _replace(stack: contextlib.ExitStack) -> None:
    import torch_pruning as tp

    import robust_prune as rp

    build = rp.DependencyGraph.build_dependency

    def built(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        return build(self, model.eval(), *args, **kwargs)

    rp.DependencyGraph.build_dependency = built  # type: ignore[method-assign]
    stack.callback(setattr, rp.DependencyGraph, "build_dependency", build)
    theirs = tp.DependencyGraph
    tp.DependencyGraph = functools.partial(rp.DependencyGraph, prune_outputs=True)
    stack.callback(setattr, tp, "DependencyGraph", theirs)
    stack.enter_context(rp.dependency_graph(prune_outputs=True))


def pytest_runtest_logreport(report: Any) -> None:
    """As a plugin: write down what became of each test."""
    if report.when == "call" or report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        line = (crash.message if crash else str(report.longrepr or "")).splitlines()
        row = {"test": report.nodeid, "outcome": report.outcome, "error": (line or [""])[0][:200]}
        with Path(os.environ[RESULTS]).open("a") as log:
            log.write(json.dumps(row) + "\n")


def run(file: Path, ours: bool) -> dict[str, dict[str, str]]:
    """Run one file of tests and return by test what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        environment = {
            **os.environ,
            RESULTS: str(results),
            OURS: "1" if ours else "",
            "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "benchmarks.torch_pruning_suite", f"--rootdir={file.parent}", str(file)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, timeout=LIMIT_S
            )
        rows = [json.loads(line) for line in results.open()] if results.exists() else []
    found = {row["test"].rpartition("/")[2]: row for row in rows}
    return found or {file.name: {"outcome": "no test", "error": ""}}


def main() -> None:
    """Run the suite twice and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="names of files, as test_load")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    files = sorted((options.checkout / "tests").resolve().glob("test_*.py"))
    rows = []
    for file in files:
        if options.only and file.stem not in options.only:
            continue
        alone, ours = run(file, ours=False), run(file, ours=True)
        for test in {**alone, **ours}:
            missing = {"outcome": "no result", "error": ""}
            before, after = alone.get(test, missing), ours.get(test, missing)
            rows.append({"test": test, "alone": before, "ours": after})
            print(test, before["outcome"], after["outcome"], after["error"])
    (options.out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = options.out / "READ_FIRST.md"
    first = words.read_text().strip() if words.exists() else ""
    (options.out / "README.md").write_text(report(rows, first))


def report(rows: list[dict[str, Any]], first: str = "") -> str:
    """Return the record: what is to be read first, the counts, and a line for each test."""
    ran = [row for row in rows if row["alone"]["outcome"] == "passed"]
    good = sum(row["ours"]["outcome"] == "passed" for row in ran)
    lines = [
        "# torch-pruning's own tests on our graph",
        "",
        *([first, ""] if first else []),
        f"- {good} of the {len(ran)} tests that pass with torch-pruning alone pass on our graph",
        "",
        "| test | alone | on our graph |",
        "|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row[who]['outcome']} {row[who]['error']}".strip() for who in ("alone", "ours")]
        lines.append(f"| {row['test']} | {cells[0]} | {cells[1]} |".replace("\n", " "))
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
