"""Trackers of experiments: which are started, what they are told, and that they are ended."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robust_prune import save
from robust_prune.cli.output import Output
from robust_prune.cli.progress import TrainingProgress, training_shown
from robust_prune.distributed import trackers
from robust_prune.errors import UsageError
from robust_prune.finetune import EpochRecord
from robust_prune.options import OutputOptions
from tests.cli.test_cli import run  # noqa: F401 - a fixture
from tests.conftest import tiny_resnet
from tests.report.test_report import record

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="extra [distributed]"
)


class Tracker:
    """What accelerate's trackers have."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def __call__(self, project: str, **more: Any) -> Tracker:
        self.told.append((project, more))
        return self

    def start(self) -> None:
        print("a word of the tracker's")
        self.told.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(values)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.told.append((values, step))

    def finish(self) -> None:
        print("another one")
        self.told.append("finish")


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """A tracker in the place of one whose package is not installed."""
    from accelerate import tracking

    there, tracker = importlib.util.find_spec, Tracker()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: there("json" if n in ("mlflow", "wandb") else n)
    )
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mlflow", tracker)
    return tracker


EPOCHS = [
    EpochRecord(0, float("nan"), 0.5, 0.25, 1.0, lr=0.1),
    EpochRecord(1, 1.5, 0.6, 0.3, 1.0, lr=0.1),
]


@needs_accelerate
def test_a_tracker_hears_of_settings_epochs_and_results(
    mlflow: Tracker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writing = OutputOptions(track=("mlflow",))
    arguments = {"prune_ratio": 0.5, "protect": ["a"], "plan": None}
    with training_shown(Output(quiet=True), writing, tmp_path, arguments) as shown:
        for epoch in EPOCHS:
            shown.on_epoch(epoch)
        shown.on_result(record())
    settings = {"prune_ratio": 0.5, "protect": "['a']", "plan": "None"}
    assert mlflow.told[:3] == [("robust-prune", {}), "start", settings]
    assert mlflow.told[-1] == "finish"
    assert capsys.readouterr().out == "", "stdout is for documents"
    first, second, result = mlflow.told[3:-1]
    assert (first[1], second[1]) == (0, 1)
    assert "loss" not in first[0], "NaN is not told"
    assert (second[0]["loss"], second[0]["clean"], second[0]["robust"]) == (1.5, 0.6, 0.3)
    assert result[0]["removed/macs"] == 0.5
    assert (result[0]["dense/pgd"], result[0]["pruned/autoattack"]) == (0.5, 0.4)


@needs_accelerate
def test_trackers_are_ended_whatever_happens(mlflow: Tracker, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        training_shown(Output(quiet=True), OutputOptions(track=("mlflow",)), tmp_path, {}),
    ):
        raise KeyboardInterrupt
    assert mlflow.told[-1] == "finish"
    with pytest.raises(UsageError, match="--track wandb: can't be started"):
        trackers(("mlflow", "wandb"), tmp_path, {})
    assert mlflow.told[-1] == "finish", "the one that was started before it"


@needs_accelerate
def test_other_processes_than_the_first_tell_nothing(mlflow: Tracker, tmp_path: Path) -> None:
    output = Output(silent=True)
    with training_shown(output, OutputOptions(track=("mlflow",)), tmp_path, {}) as shown:
        shown.on_epoch(EPOCHS[1])
    assert mlflow.told == []


@needs_accelerate
@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="extra [tensorboard]")
def test_accelerates_own_tracker_writes_files(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    started = trackers(("tensorboard", "tensorboard"), tmp_path, {"seed": 0, "arch": "a"})
    shown = TrainingProgress(Output(quiet=True), None, started)
    with shown.shown():
        shown.on_epoch(EPOCHS[1])
    assert len(started) == 1
    found = EventAccumulator(str(tmp_path / "robust-prune")).Reload()
    assert found.Scalars("robust")[0].value == pytest.approx(0.3)


def test_what_can_not_be_tracked_is_one_line(
    run: Callable[..., tuple[int, str, str]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(tiny_resnet(), "m.safetensors")
    few = ["compress", "m.safetensors", "--ratio", 0.5, "--data", "none"]
    code, _, err = run(*few, "--track", "neptune")
    assert (code, err.count("\n")) == (2, 1)
    assert "use one of tensorboard, mlflow, wandb, trackio" in err
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "mlflow" else there(n))
    code, _, err = run(*few, "--track", "mlflow")
    assert (code, "package mlflow: pip install mlflow" in err) == (2, True)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "accelerate" else there(n)
    )
    code, _, err = run(*few, "--track", "tensorboard")
    assert (code, "'robust-prune[distributed]'" in err) == (2, True)
    assert not Path("m-pruned").exists()
