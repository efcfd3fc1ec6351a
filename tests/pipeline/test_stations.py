"""What passes from station to station: the record, what is kept once, and training into a file."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robust_prune import compress, load
from robust_prune.data import from_iterable
from robust_prune.distributed import Processes
from robust_prune.errors import RunError
from robust_prune.finetune import EpochRecord, History, TrainingConfig
from robust_prune.models import resolve_spec
from robust_prune.pipeline import (
    CompressResult,
    Events,
    RunFolder,
    fingerprint,
    run_path,
    train_file,
)
from robust_prune.pipeline.job import Job
from robust_prune.pipeline.journal import Journal
from robust_prune.pipeline.keeping import is_kept, once
from robust_prune.pipeline.record import (
    Candidate,
    Fitted,
    Pruned,
    Recalibrated,
    Record,
    Search,
    SelfCheck,
    Step,
)
from robust_prune.pipeline.settings import Settings
from robust_prune.repair import Fit
from robust_prune.types import Curve, ThreatModel
from tests.conftest import tiny_resnet
from tests.pipeline.test_run_folder import CrashError, fail_after, own_data

PRUNED = Pruned(
    reachable=0.75,
    curves=(Curve("a", (0.5, 0.9), (0.1, 0.4)),),
    search=Search("PGD-5", 16, 1, (Candidate(2.0, 10, (4, 8)), Candidate(1.5, 12, (5, 7)))),
    self_check=SelfCheck(done=True, images=2, dtype="float64", error=1e-12),
    reconstruction=Fitted(8, (Fit("a", 0.5, 0.25),)),
    batchnorm=Recalibrated(3, 48),
)


@pytest.fixture(scope="module")
def small() -> CompressResult:
    """A run with as little work as there can be."""
    return compress(
        tiny_resnet(num_classes=5), own_data(), allocation="uniform", calibration_images=2
    )


def job_of(folder: Path | None, processes: Processes | None = None) -> Job:
    """A run that is at its beginning."""
    events = Events()
    return Job(
        dense=tiny_resnet(),
        splits=None,
        settings=Settings(),
        input_size=(3, 32, 32),
        events=events,
        journal=Journal(events),
        folder=None if folder is None else RunFolder(folder),
        processes=processes or Processes(),
    )


def without_times(value: Any) -> Any:
    """A report without what differs from run to run."""
    if isinstance(value, dict):
        times = ("seconds", "latency_ms", "images_per_second")
        return {k: without_times(v) for k, v in value.items() if k not in times}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def test_what_a_step_tells_comes_back_from_json() -> None:
    assert Pruned.from_plain(json.loads(json.dumps(PRUNED.plain()))) == PRUNED
    few = Pruned(reachable=0.5, self_check=SelfCheck(done=False))
    assert few.plain() == {"reachable": 0.5, "self_check": {"done": False}}
    assert Pruned.from_plain(few.plain()) == few


def test_what_is_told_never_takes_the_place_of_an_entry_of_the_report(
    small: CompressResult,
) -> None:
    told = {field.name for field in dataclasses.fields(Pruned)}
    own = {"schema", "status", "plan", "plan_digest", "evaluation", "notes", "steps", "seconds"}
    assert own <= set(small.report)
    assert not told & own
    with pytest.raises(TypeError, match="plan"):
        Journal(Events()).tell(plan="mine")


def test_a_part_is_made_once_and_the_record_goes_on_from_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    made = []

    def make(job: Job) -> dict[str, int]:
        made.append(job)
        job.journal.note("made")
        with job.journal.timed("work"):
            job.journal.tell(reachable=0.5)
        return {"x": 1}

    first = job_of(tmp_path / "run")
    assert not is_kept(first, "part")
    assert once(first, "part", lambda found: found, lambda: make(first)) == {"x": 1}
    again = job_of(tmp_path / "run")
    again.journal.note("told before the part is taken up")
    assert is_kept(again, "part")
    assert once(again, "part", lambda found: found["x"], lambda: make(again)["x"]) == 1
    assert again.journal.record == first.journal.record
    assert made == [first]


def test_nothing_is_kept_without_a_folder_or_by_another_process(tmp_path: Path) -> None:
    class Second(Processes):
        rank, size = 1, 2

    (tmp_path / "run").mkdir()
    for job in (job_of(None), job_of(tmp_path / "run", Second())):
        parts = [once(job, "part", lambda found: found, dict) for _ in range(2)]
        assert parts == [{}, {}]
        assert not is_kept(job, "part")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other heaps give back by themselves")
def test_a_station_leaves_no_memory_of_its_own() -> None:
    """Large tensors that are freed between small ones stay with the process otherwise."""

    def resident() -> float:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    kept: list[Tensor] = []
    before = resident()
    with Journal(Events()).timed("station"):
        large = []
        for _ in range(1600):
            large.append(torch.ones(2**14))  # 64 KiB: larger ones may come from elsewhere
            kept.append(torch.ones(100))
        inside = resident()
        large.clear()
    assert inside > before + 80
    assert resident() < before + 30


def test_the_record_is_kept_as_folders_have_it(small: CompressResult) -> None:
    """The names are those of folders that are there: renaming one ends their runs."""
    history = History("pgd-at", (EpochRecord(0, float("nan"), 0.5, 0.25, 1.0),), 0, "few")
    record = Record(("a note",), {"plan": 1.5}, PRUNED, (Step(small.plan, history, PRUNED),))
    plain = record.plain()
    assert set(plain) == {"notes", "seconds", "parts", "steps"}
    assert set(plain["parts"]) == {
        "reachable",
        "curves",
        "search",
        "self_check",
        "reconstruction",
        "batchnorm",
    }
    assert set(plain["steps"][0]) == {"plan", "finetune", *plain["parts"]}
    assert plain["steps"][0]["finetune"]["epochs"][0]["loss"] is None
    journal = Journal(Events())
    journal.restore(json.loads(json.dumps(plain)))
    assert journal.record == dataclasses.replace(record, steps=())


OPTIONS: dict[str, Any] = {
    "finetune": "pgd-at",
    "epochs": 2,
    "attack_steps": 1,
    "batch_size": 16,
    "steps": 2,
    "calibration_images": 8,
    "evaluation": "pgd",
    "test": own_data(8),
}


def stop_after(part: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends right after it has kept a part."""
    with monkeypatch.context() as patch:
        fail_after(part, patch)
        with pytest.raises(CrashError):
            compress(tiny_resnet(num_classes=5), own_data(), run_dir=folder, **OPTIONS)


def test_a_run_taken_up_tells_the_same_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_resnet(num_classes=5)
    whole = compress(model, own_data(), **OPTIONS)
    assert {"curves", "search", "reconstruction"} <= set(whole.report)
    for part in ("pruned-1", "planned-2", "measured-dense"):
        folder = tmp_path / part
        stop_after(part, folder, monkeypatch)
        again = compress(model, own_data(), run_dir=folder, resume=True, **OPTIONS)
        assert without_times(again.report) == without_times(whole.report)
        assert fingerprint(again.model) == fingerprint(whole.model)


def test_what_another_plan_has_cut_is_not_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = tiny_resnet(num_classes=5), tmp_path / "run"
    stop_after("pruned-1", folder, monkeypatch)
    state = RunFolder(folder).state("pruned-1")
    found = state.load()
    assert found is not None
    state.save({"model": {name: torch.zeros_like(t) for name, t in found["model"].items()}})
    (folder / "planned-1.json").unlink()
    whole = compress(model, own_data(), **OPTIONS)
    again = compress(model, own_data(), run_dir=folder, resume=True, **OPTIONS)
    assert fingerprint(again.model) == fingerprint(whole.model)


def test_training_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = resolve_spec("resnet18", {**tiny_resnet().spec.kwargs, "num_classes": 5})
    spec = dataclasses.replace(spec, input_size=(3, 16, 16))
    splits = from_iterable(own_data(64))
    config = TrainingConfig("pgd-at", epochs=1, threat=ThreatModel.linf(0.1), attack_steps=1)
    target = tmp_path / "m.safetensors"
    plain = train_file(spec, splits, config, target, Events())
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    assert fingerprint(load(target)) == fingerprint(plain.model)
    assert plain.record["status"] == "trained"

    def crash(self: RunFolder, part: str, values: object) -> None:
        raise CrashError

    other = tmp_path / "other.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "record", crash)
        with pytest.raises(CrashError):
            train_file(spec, splits, config, other, Events(), arguments={"a": 1})
    assert not run_path(other).exists()  # it had no state to go on from
    with pytest.raises(RunError, match="no run there"):
        train_file(spec, splits, config, other, Events(), arguments={"a": 1}, resume=True)
    again = train_file(spec, splits, config, other, Events(), arguments={"a": 1})
    assert fingerprint(again.model) == fingerprint(plain.model)
    assert not run_path(other).exists()
