"""Planning with data: seconds and what is kept, by several versions of the package.

    python -m benchmarks.planning --model FILE --data DIR --versions before=TREE now=. \
        --out RECORD [--options "--arch resnet18 ..."]

TREE is a checkout. Each version runs `robust-prune compress` without fine-tuning in a process of
its own, by turns, on one thread; seconds are those of the CPU, reading and writing files included,
and by station those of the clock.
What they made is attacked by this version, on the same test images.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import robust_prune
from benchmarks.runs import log_of
from robust_prune.types import ThreatModel

IMAGES = 512


def planned(tree: Path, out: Path, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Prune in a process of its own; return its seconds and its own report's."""
    command = [sys.executable, "-m", "robust_prune", "compress", str(asked.model.resolve())]
    command += ["--data", str(asked.data.resolve()), "--ratio", str(asked.ratio), "--quick"]
    command += ["--n-eval", "1"]
    command += ["--calibration-images", str(IMAGES), "--seed", str(seed), "--out", str(out)]
    command += shlex.split(asked.options)
    process: dict[str, Any] = {
        "check": True,
        "cwd": out.parent,  # Python would take the package from here before the tree's
        "env": {**os.environ, "PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1"},
    }
    where = "import robust_prune; print(robust_prune.__file__)"
    found = subprocess.run([sys.executable, "-c", where], capture_output=True, text=True, **process)
    if not Path(found.stdout.strip()).is_relative_to(tree.resolve()):
        raise SystemExit(f"{found.stdout.strip()} is not in {tree}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, **process)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads((out / "report.json").read_text())
    return {
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "stages": report["seconds"],
        "threat": report["threat"],
    }


def judged(out: Path, threat: dict[str, Any], asked: argparse.Namespace) -> Any:
    """Attack the model that a run wrote."""
    (path,) = out.glob("*.safetensors")
    attacker = ThreatModel(threat["norm"], threat["eps"])
    model = robust_prune.load(path)
    return robust_prune.evaluate(
        model, str(asked.data), threat=attacker, attack="pgd", n=asked.n, seed=0
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--versions", nargs="+", required=True, metavar="NAME=TREE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--options", default="", help="of compress, for the model")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--n", type=int, default=2000)
    asked = parser.parse_args()
    trees = {name: Path(path) for name, _, path in (v.partition("=") for v in asked.versions)}
    told = {"model": asked.model.name, "data": asked.data.name, "ratio": asked.ratio}
    with log_of(asked.out, **told) as write:
        for seed in asked.seeds:
            evaluations = {}
            for name, tree in trees.items():
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "out"
                    run = planned(tree, out, seed, asked)
                    found = evaluations[name] = judged(out, run["threat"], asked)
                accuracy = {m.attack: str(m.accuracy) for m in found.measurements}
                write({"version": name, "seed": seed, **run, "n": found.n, "accuracy": accuracy})
                print(f"{name}, seed {seed}: {run['cpu_seconds']:.0f} s, {accuracy}", flush=True)
            first, *others = evaluations
            for other in others:
                test = evaluations[first].compare(evaluations[other])["pgd"]
                pair = {**asdict(test), "p": test.p_value}
                write({"first": first, "second": other, "seed": seed, "pgd": pair})
                print(f"{first} against {other}, seed {seed}: {pair}", flush=True)


if __name__ == "__main__":
    main()
