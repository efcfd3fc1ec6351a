"""Two processes on the CPU: they prune alike, train alike, and one of them writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from robust_prune import load, save
from robust_prune.distributed import ALONE, processes
from tests.conftest import tiny_resnet

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# --multi_gpu is what makes it start several; the processes themselves choose the CPU
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
ACCELERATE += ["--main_process_port", "29613"]


def launch(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).resolve().parent.parent
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "PYTHONPATH": str(here)},
        timeout=280,
        check=False,
        cwd=cwd or here,
    )


def told(folder: Path, *launcher: str) -> list[dict[str, Any]]:
    """What the processes of `distributed_child` wrote, by rank."""
    done = launch(*launcher, "-m", "tests.distributed_child", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(p.read_text()) for p in sorted(folder.parent.glob(f"{folder.name}-*.json"))]


def test_two_processes_agree_with_one_another_and_with_one_alone(tmp_path: Path) -> None:
    (alone,) = told(tmp_path / "one")
    two = told(tmp_path / "two", *TORCHRUN)
    assert [(line["rank"], line["size"]) for line in two] == [(0, 2), (1, 2)]
    # between ranks: weights, batch-norm statistics, plan and verdicts
    assert {k: v for k, v in two[0].items() if k != "rank"} == {
        k: v for k, v in two[1].items() if k != "rank"
    }
    # against one process: the plan to the bit, the training of a net without batch norm
    assert two[0]["plan"] == alone["plan"]
    assert two[0]["untuned"] == alone["untuned"]
    torch.testing.assert_close(two[0]["steps"], alone["steps"], rtol=1e-5, atol=1e-6)
    assert two[0]["validation"][0] == alone["validation"][0]
    assert two[0]["n"] == alone["n"] == 61
    # accuracy within noise: three standard errors of the difference of two shares of 61 images
    spread = 3 * (2 * 0.25 / 61) ** 0.5
    assert two[0]["clean"] == pytest.approx(alone["clean"], abs=spread)
    assert (tmp_path / "two" / "complete.json").exists()


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(TORCHRUN, id="torchrun"),
        pytest.param(ACCELERATE, id="accelerate", marks=pytest.mark.slow),
    ],
)
def test_the_command_line_under_a_launcher(launcher: list[str], tmp_path: Path) -> None:
    save(tiny_resnet(in_chans=1), tmp_path / "m.safetensors")
    command = ["-m", "robust_prune", "compress", "m.safetensors", "--ratio", "0.5"]
    command += ["--data", "digits", "--input-size", "1,16,16", "--eps", "0.1", "--finetune"]
    command += ["n-fgsm", "--epochs", "1", "--eval", "pgd", "--n-eval", "20", "--device", "cpu"]
    command += ["--allocation", "uniform"]
    done = launch(*launcher, *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("wrote m-pruned/report.json") == 1
    report = json.loads((tmp_path / "m-pruned" / "report.json").read_text())
    assert report["processes"] == 2
    assert report["status"] == "evaluated"
    assert load(tmp_path / "m-pruned" / "m-pruned.safetensors")(torch.rand(1, 1, 32, 32)).shape
    assert sorted(p.name for p in (tmp_path / "m-pruned").iterdir()) == [
        "m-pruned.safetensors",
        "report.html",
        "report.json",
        "run",
    ]
    if launcher is TORCHRUN:
        again = launch(*launcher, *command, cwd=tmp_path)
        assert again.returncode != 0
        told = [line for line in again.stderr.splitlines() if line.startswith("error: m-pruned/")]
        assert len(told) == 1, again.stderr[-2000:]


def test_an_error_of_the_first_process_ends_all_with_one_line(tmp_path: Path) -> None:
    save(tiny_resnet(), tmp_path / "m.safetensors")
    command = ["-m", "robust_prune", "compress", "m.safetensors", "--ratio", "0.9999"]
    done = launch(*TORCHRUN, *command, "--device", "cpu", cwd=tmp_path)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr[:2000]
    assert not (tmp_path / "m-pruned").exists()


def test_one_process_needs_nothing() -> None:
    assert processes() is ALONE
    values = torch.ones(3)
    assert ALONE.total(values) is values
    assert ALONE.on_first(lambda: 5) == 5
    assert ALONE.gathered([1]) == [1]
