"""What the bare command costs at full image size: seconds and memory of whole processes.

    python -m benchmarks.without_data.seconds --out RECORD

For each network, with random weights (neither speed nor memory depends on them), a process of its
own runs `robust-prune compress model.pt --ratio 0.5` on one thread, at the size that timm names
(224 px, for MobileViTs 256). Seconds of CPU are user and system time, which other work on the
machine disturbs less than wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch

from robust_prune.models import library_versions
from robust_prune.pipeline import hardware

ARCHITECTURES = ("resnet18", "vit_tiny_patch16_224", "mobilevit_xxs", "mobilevitv2_050")
COMMAND = ("compress", "model.pt", "--ratio", "0.5")
MOST_SECONDS, MOST_GIB = 45, 2


def measured(arch: str) -> dict[str, Any]:
    """Run the bare command on a network and return what the process took.

    Returns:
        Seconds (wall and CPU), the largest resident memory in GiB, and seconds by station.
    """
    torch.manual_seed(0)
    weights = timm.create_model(arch).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"arch": arch, "state_dict": weights}, Path(folder, "model.pt"))
        command = [sys.executable, "-m", "robust_prune", *COMMAND]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=_environment())
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        if status:
            raise SystemExit(f"{arch}: the command ended with status {status}")
        report = json.loads(Path(folder, "model-pruned", "report.json").read_text())
    return {
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gib": round(used.ru_maxrss / 2**20, 2),
        "plan_digest": report["plan_digest"],
        "seconds": report["seconds"],
    }


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path.rstrip(os.pathsep)}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the figures as rows of a table."""
    lines = ["| network | CPU, s | wall, s | peak, GiB |", "|---|---|---|---|"]
    for arch, cost in found.items():
        lines.append(
            f"| {arch} | {cost['cpu_seconds']:.0f} | {cost['wall_seconds']:.0f} "
            f"| {cost['peak_gib']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the table, and write `seconds.json`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the record")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES))
    options = parser.parse_args()
    found = {arch: measured(arch) for arch in options.architectures}
    print(f"limits: {MOST_SECONDS} s, {MOST_GIB} GiB\n{table(found)}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        record = {
            "command": " ".join(("robust-prune", *COMMAND)),
            "threads": 1,
            "versions": library_versions(),
            "hardware": hardware(torch.device("cpu")),
            "networks": found,
        }
        (options.out / "seconds.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
