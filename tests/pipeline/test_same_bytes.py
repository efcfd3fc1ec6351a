"""The same command gives the same bytes, in fresh processes and on other numbers of threads."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from robust_prune import save
from robust_prune.distributed import Processes
from robust_prune.errors import RunError
from robust_prune.pipeline import RunFolder
from robust_prune.pipeline.describing import without_times
from robust_prune.pipeline.holding import held_for_all
from tests.conftest import tiny_resnet

COMPRESS = ["compress", "m.safetensors", "--ratio", "0.5", "--eps", "0.1"]
DIGITS = ["--data", "digits", "--input-size", "1,16,16", "--calibration-images", "8"]
UNTUNED = ["--finetune", "none", "--eval", "pgd", "--n-eval", "6"]


def heard_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def started(folder: Path, *arguments: str, threads: int = 1) -> subprocess.Popen[str]:
    here = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [sys.executable, "-m", "robust_prune", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(here)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # what `nohup` has shells ignore, their children would ignore too
        preexec_fn=None if os.name == "nt" else heard_hangups,
    )


def compressed(folder: Path, *more: str, threads: int = 1) -> tuple[str, dict[str, object]]:
    """The digest of the model file and the plan that a process of its own gives."""
    folder.mkdir()
    save(tiny_resnet(in_chans=1), folder / "m.safetensors")
    _, err = (process := started(folder, *COMPRESS, *DIGITS, *more, threads=threads)).communicate()
    assert process.returncode == 0, err
    out = folder / "m-pruned"
    plan = json.loads((out / "report.json").read_text())["plan"]
    return hashlib.sha256((out / "m-pruned.safetensors").read_bytes()).hexdigest(), plan


def test_the_same_command_writes_the_same_bytes_in_fresh_processes(tmp_path: Path) -> None:
    quick = [*UNTUNED, "--allocation", "uniform"]
    assert compressed(tmp_path / "a", *quick) == compressed(tmp_path / "b", *quick)


@pytest.mark.slow
def test_the_plan_is_the_same_over_one_and_two_threads(tmp_path: Path) -> None:
    (_, one), (_, two) = (compressed(tmp_path / str(n), *UNTUNED, threads=n) for n in (1, 2))
    for plan in (one, two):
        for group in plan["groups"]:  # type: ignore[attr-defined]
            group.pop("mrs")  # a measurement, equal but for the order of sums
    assert one == two


def test_only_times_are_left_out() -> None:
    record = {"seconds": 3.0, "epochs": ({"loss": 0.5, "seconds": 2.0}, {"latency_ms": 1.0})}
    assert without_times(record) == {"epochs": [{"loss": 0.5}, {}]}


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_lost_line_stops_a_run_as_ctrl_c_does(tmp_path: Path) -> None:
    save(tiny_resnet(in_chans=1), tmp_path / "m.safetensors")
    process = started(tmp_path, *COMPRESS, *DIGITS)
    config = tmp_path / "m-pruned" / "run" / "config.json"
    while not config.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped" in err
    assert "compress --resume m-pruned goes on" in err
    assert RunFolder(config.parent).exists()


class Second(Processes):
    """The second of two, which hears what the first was refused."""

    rank, size = 1, 2

    def from_first(self, value: object) -> object:
        return "RunError", "another run is at work there"


def test_what_the_first_process_is_refused_all_are(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    begun: list[RunFolder] = []
    for processes in (Processes(), Second()):
        with (
            RunFolder(tmp_path / "run").held(),
            pytest.raises(RunError, match="another run is at work"),
            held_for_all(folder, processes, begun.append),
        ):
            raise AssertionError("the folder was held twice")
    with held_for_all(folder, Processes(), begun.append):
        pass
    assert begun == [folder]
