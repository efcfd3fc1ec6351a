"""Kills a compression at given moments, and goes on with it: run as a process of its own.

    python -m tests.killing FOLDER KILLS [--short]

Everything is imported once; each run is a fork, which one thread makes safe. Prints one JSON
document: the seconds of a run without a break, and for each kill how far the run had come and
whether its end was that of the run without a break. `--short` cuts AutoAttack's steps.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from robust_prune import ThreatModel, compress, load, save
from robust_prune.data import as_split, open_data
from robust_prune.modules import seeded
from robust_prune.pipeline import RunFolder, fingerprint
from tests.conftest import tiny_resnet
from tests.shortened import OURS, Shortened

DIGITS = open_data("digits", input_size=(1, 16, 16))
STATIONS = "sensitivity", "fine-tuning", "evaluation", "fine-tuning 2"
SPLITS = replace(DIGITS, train=as_split(DIGITS.train.take(192, 0)))


def run(folder: Path, resume: bool) -> None:
    """One compression with every station; its end is written beside the run."""
    # nothing may depend on what a process has drawn before
    torch.manual_seed(time.time_ns())
    model = load(folder.parent / "model.safetensors")
    state = RunFolder(folder, save_seconds=0.0)
    original = RunFolder.__init__

    def eager(self: RunFolder, path: Any, **_: Any) -> None:
        original(self, path, save_seconds=0.0)

    RunFolder.__init__ = eager  # type: ignore[method-assign]
    result = compress(
        model,
        SPLITS,
        prune_ratio=0.5,
        threat=ThreatModel.linf(0.1),
        finetune="n-fgsm",
        epochs=2,
        evaluation="autoattack",
        n_eval=8,
        run_dir=folder,
        resume=resume,
        prune_steps=2,
        calibration_images=8,
        batch_size=64,
        lr=0.05,
        validation_images=32,
        ema=0.9,
    )
    assert state.complete
    end = {
        "weights": fingerprint(result.model),
        "plan": result.plan.digest,
        "epochs": [[e.loss, e.clean, e.robust] for e in result.history.epochs[1:]],
        "verdicts": [m.correct for e in (result.dense, result.pruned) for m in e.measurements],
    }
    save(result.model, folder / "end.safetensors")
    (folder / "end.json").write_text(json.dumps(end))


def in_a_fork(
    work: Callable[[], None],
    kill_after: float | None = None,
    when: Callable[[], bool] = lambda: True,
) -> bool:
    """Do something in a process of its own; True if it came to its end.

    It is killed some seconds after `when` has become true.
    """
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - a fork must never go on as its parent
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        while not when():
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break  # it has ended before
            time.sleep(0.002)
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if status not in (0, signal.SIGKILL):
        raise SystemExit(f"the run failed by itself: {status}")
    return status == 0


def progress(folder: Path) -> str:
    """The station that a killed run was at, told by the parts that are there."""
    parts = {p.name for p in folder.iterdir()} if folder.exists() else set()
    if "config.json" not in parts:
        return "start"
    if "complete.json" in parts:
        return "end"
    if {"measured-dense.json", "measured-pruned.json"} & parts:
        return "evaluation"
    step = 2 if "planned-2.json" in parts else 1
    if f"pruned-{step}.json" in parts:
        return (
            f"fine-tuning {step}"
            if f"tuned-{step}.safetensors" in parts
            else f"after pruning {step}"
        )
    return f"pruning {step}" if f"planned-{step}.json" in parts else f"sensitivity {step}"


def _has_come_to(station: str, folder: Path) -> bool:
    return progress(folder).startswith(station)


def main() -> None:
    """Run once without a break, then kill and go on, the kills spread over the whole run.

    A busy machine makes later runs slower than the first, so that every second kill waits for a
    station to begin instead of a moment.
    """
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    if "--short" in sys.argv:
        OURS.AutoAttack = Shortened  # type: ignore[attr-defined]
    with seeded(0):
        save(tiny_resnet(in_chans=1), root / "model.safetensors")
    begun = time.perf_counter()
    in_a_fork(lambda: run(root / "whole", False))
    seconds = time.perf_counter() - begun
    whole = json.loads((root / "whole" / "end.json").read_text())
    generator, found = random.Random(0), []
    for i in range(kills):
        folder = root / f"killed-{i}"
        moment = (i + generator.random()) / kills * seconds
        begin = partial(run, folder, False)
        if i % 2:
            station = STATIONS[i // 2 % len(STATIONS)]
            wait = 0.02 * generator.random() * seconds
            in_a_fork(begin, wait, partial(_has_come_to, station, folder))
        else:
            in_a_fork(begin, moment)
        at = progress(folder)
        if at == "end":  # complete, but killed before its end was written here
            RunFolder(folder).clear()
        if not (folder / "end.json").exists():
            began = (folder / "config.json").exists()
            # killed twice where there is time: the second run is killed early
            in_a_fork(lambda folder=folder, began=began: run(folder, began), 0.3 * seconds)  # type: ignore[misc]
        if not (folder / "end.json").exists():
            began = (folder / "config.json").exists() and progress(folder) != "end"
            if not began:
                RunFolder(folder).clear()
            in_a_fork(lambda folder=folder, began=began: run(folder, began))  # type: ignore[misc]
        end = json.loads((folder / "end.json").read_text())
        found.append({"seconds": moment, "at": at, "same": end == whole})
    print(json.dumps({"seconds": seconds, "kills": found}))


if __name__ == "__main__":
    main()
