"""Runs that are stopped and go on: the folder's files, the command line, and real kills."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robust_prune import compress, load, save
from robust_prune.errors import BudgetError, ModelError, PlanError, RunError
from robust_prune.files import locked, write_tensors
from robust_prune.pipeline import RunFolder, StateFile, fingerprint
from robust_prune.types import PruningPlan
from tests.cli.test_cli import KWARGS, run, train  # noqa: F401 - a fixture and a helper
from tests.conftest import tiny_resnet

TRYING: dict[str, Any] = {"prune_ratio": 0.7, "allocation": "uniform", "calibration_images": 4}
OWN_METHOD = "tests.pipeline.test_run_folder:own_method"


def own_data(n: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 5


@pytest.mark.parametrize("kills", [6, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.timeout(2400)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_end(kills: int, tmp_path: Path) -> None:
    short = ["--short"] if kills < 20 else []
    done = subprocess.run(
        [sys.executable, "-m", "tests.killing", str(tmp_path), str(kills), *short],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=2300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-800:]
    found = json.loads(done.stdout)["kills"]
    assert len(found) == kills
    assert all(kill["same"] for kill in found), found
    stations = {kill["at"].split()[0] for kill in found}
    assert stations >= {"sensitivity", "fine-tuning", "evaluation"}, stations


class CrashError(Exception):
    pass


def fail_after(
    part: str, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = CrashError
) -> None:
    """Let every run end right after it has kept a part, until the patch is undone."""
    original = RunFolder.keep

    def keep(self: RunFolder, name: str, value: object) -> None:
        original(self, name, value)
        if name == part:
            raise error

    monkeypatch.setattr(RunFolder, "keep", keep)


@pytest.mark.parametrize("part", ["planned-1", "pruned-1", "measured-before", "measured-pruned"])
def test_a_crash_right_after_a_part_was_kept_changes_nothing(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills come at random; this is the moment that most depends on the order of writes."""
    options = {
        "allocation": "uniform",
        "finetune": "pgd-at",
        "epochs": 1,
        "attack_steps": 1,
        "batch_size": 16,
        "evaluation": "pgd",
        "test": own_data(8),
    }
    model = tiny_resnet(num_classes=5)
    whole = compress(model, own_data(), **options)
    original = RunFolder.keep
    fail_after(part, monkeypatch)
    with pytest.raises(CrashError):
        compress(model, own_data(), run_dir=tmp_path / "run", **options)
    monkeypatch.setattr(RunFolder, "keep", original)
    torch.manual_seed(99)
    again = compress(model, own_data(), run_dir=tmp_path / "run", resume=True, **options)
    assert fingerprint(again.model) == fingerprint(whole.model)
    assert again.plan == whole.plan
    for which in ("dense", "pruned"):
        mine, theirs = getattr(again, which), getattr(whole, which)
        assert [m.correct for m in mine.measurements] == [m.correct for m in theirs.measurements]
    assert again.report["notes"] == whole.report["notes"]
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert [line["epoch"] for line in RunFolder(tmp_path / "run").metrics("step 1")] == [0, 1]


def test_a_run_with_other_settings_or_weights_is_refused(tmp_path: Path) -> None:
    model, data = tiny_resnet(num_classes=5), own_data()
    compress(model, data, allocation="uniform", run_dir=tmp_path / "run")
    with pytest.raises(RunError, match="another settings: allocation 'uniform', not 'mrs'"):
        compress(model, data, allocation="mrs", run_dir=tmp_path / "run", resume=True)
    with torch.no_grad():
        model.net.fc.bias += 1
    with pytest.raises(RunError, match="another model"):
        compress(model, data, allocation="uniform", run_dir=tmp_path / "run", resume=True)
    with pytest.raises(RunError, match="no run there"):
        compress(model, data, run_dir=tmp_path / "other", resume=True)


def test_other_images_and_a_complete_run_are_refused(tmp_path: Path) -> None:
    model, data = tiny_resnet(num_classes=5), own_data()
    folder = tmp_path / "run"
    compress(model, data, allocation="uniform", run_dir=folder)
    with pytest.raises(RunError, match="is complete"):
        compress(model, data, allocation="uniform", run_dir=folder, resume=True)
    (folder / "complete.json").unlink()
    with pytest.raises(RunError, match="another data: digest"):
        compress(
            model, (data[0].flip(0), data[1]), allocation="uniform", run_dir=folder, resume=True
        )
    with pytest.raises(RunError, match="not complete; resume=True goes on"):
        compress(model, data, allocation="uniform", run_dir=folder)


def test_a_folder_that_is_no_run_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="no run there"):
        compress(tiny_resnet(num_classes=5), own_data(), run_dir=tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    with pytest.raises(RunError, match="is a file"):
        compress(tiny_resnet(num_classes=5), own_data(), run_dir=tmp_path / "thesis.txt")


def test_a_step_that_has_nothing_left_to_prune_is_passed_over() -> None:
    result = compress(
        tiny_resnet(num_classes=5),
        own_data(),
        prune_ratio=0.1,
        prune_steps=12,
        round_to=4,
        allocation="uniform",
    )
    assert any("prunes nothing" in note for note in result.report["notes"])
    assert len(result.report["steps"]) >= 1


def test_a_budget_out_of_reach_is_said_before_the_first_of_several_steps(tmp_path: Path) -> None:
    options = {**TRYING, "prune_steps": 2, "protect": ["layer1.*", "layer2.*"]}
    with pytest.raises(BudgetError, match=r"removing 70\.0 %.*use --ratio 0\.325"):
        compress(tiny_resnet(), None, run_dir=tmp_path, **options)
    assert not list(tmp_path.glob("**/*-1*"))  # no step has left anything


def test_a_plan_of_another_network_is_refused_before_images_are_attacked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = compress(tiny_resnet(), None, **TRYING).plan
    monkeypatch.setattr("robust_prune.pipeline.compression.observe", lambda *a, **k: 1 / 0)
    with pytest.raises(PlanError, match="the plan expects"):
        compress(tiny_resnet(channels=(4, 4, 4, 4)), None, plan=plan)


def test_a_later_step_goes_as_far_as_the_whole_may_where_its_budget_asks_for_it() -> None:
    options = {**TRYING, "prune_ratio": 0.934}
    result = compress(tiny_resnet(), None, prune_steps=2, **options)
    assert result.plan.reached == pytest.approx(0.934, abs=0.001)
    assert "step 2 takes up to 95 % of a group to reach its budget" in result.report["notes"]


@pytest.mark.parametrize("finetune", [None, "pgd-at"])
def test_a_last_step_that_prunes_nothing_leaves_the_report_of_the_one_before(
    finetune: str | None,
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)
    )
    net(torch.rand(1, 3, 16, 16))
    result = compress(
        net,
        own_data(),
        prune_ratio=0.124,
        target="channels",
        prune_steps=2,
        finetune=finetune,
        epochs=0 if finetune is None else 2,
    )
    report = result.report
    assert "step 2 prunes nothing: the one before has gone that far" in report["notes"]
    assert report["status"] == ("pruned" if finetune is None else "fine-tuned")
    assert report["self_check"]["done"]
    assert report["reconstruction"]["layers"]
    assert report["steps"][0]["self_check"] == report["self_check"]
    assert sum(g.width - g.keep_width for g in result.plan.groups) == 1


def test_of_several_steps_the_budget_of_all_is_told() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)
    )
    net(torch.rand(1, 3, 16, 16))
    options: dict[str, Any] = {"prune_ratio": 0.45, "target": "channels", "allocation": "uniform"}
    plan = compress(net, None, prune_steps=2, input_size=(3, 16, 16), **options).plan
    told = [note for note in plan.notes if note.startswith("asked to remove")]
    reached = f"{100 * plan.reached:.1f} % are removed"
    assert abs(plan.reached - 0.45) > 0.01, "of 8 channels 3 or 4 can go"
    assert told == [f"asked to remove 45.0 % of the channels, {reached}: no step came closer"]


def test_without_data_the_grade_is_that_of_all_steps() -> None:
    grades = {
        str(compress(tiny_resnet(), None, prune_steps=n, **TRYING).report["calibration"]["grade"])
        for n in (1, 2)
    }
    assert len(grades) == 1


class Sharing(nn.Module):
    """Two groups in the channels of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Conv2d(3, 32, 3)
        self.first, self.second = 12, 20
        self.one, self.two = nn.Conv2d(12, 5, 1), nn.Conv2d(20, 5, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first, second = self.both(images).relu().split([self.first, self.second], 1)
        return (self.one(first) + self.two(second)).mean((2, 3))


def test_steps_on_groups_that_share_a_tensor_make_one_plan() -> None:
    torch.manual_seed(0)
    net = Sharing().eval()
    options: dict[str, Any] = {"score": "l2", "reconstruct": False}
    result = compress(
        net,
        None,
        prune_ratio=0.6,
        prune_steps=3,
        allocation="uniform",
        input_size=(3, 16, 16),
        **options,
    )
    assert [g.name for g in result.plan.groups] == ["both@0", "both@12"]
    plan = PruningPlan.from_json(result.plan.to_json())
    replayed = compress(net, None, plan=plan, input_size=(3, 16, 16), **options)
    assert fingerprint(replayed.model) == fingerprint(result.model)


def test_wrong_training_settings_fail_before_the_work(
    run: Callable[..., tuple[int, str, str]],  # noqa: F811
) -> None:
    train(run)
    code, out, err = run("compress", "model.pt", "--ratio", 0.5, "--optimizer", "sdg")
    assert code == 2
    assert "sdg" in err
    assert "adversarial set" not in out
    assert not Path("model-pruned").exists()
    code, out, err = run("train", "--from", "model.pt", "--method", "rslad", "--out", "a.pt")
    assert code == 2
    assert not Path("a.pt.run").exists()
    Path("digits").mkdir()  # a folder does not hide the data set of that name
    code, out, err = run("compress", "model.pt", "--ratio", 0.5, "--data", "digits", "--quick")
    assert code == 0, err


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("evil"),))


def test_a_state_never_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tuned-1.safetensors"
    torch.save({"model": Evil()}, path)
    with pytest.raises(RunError, match="delete it"):
        StateFile(path).load()
    for protocol in range(6):
        path.write_bytes(pickle.dumps({"model": Evil()}, protocol))
        with pytest.raises(RunError, match="delete it"):
            StateFile(path).load()
    assert not (tmp_path / "evil").exists()
    for text in (b"", b"PK\x03\x04 cut"):
        path.write_bytes(text)
        with pytest.raises(RunError, match="not a readable state"):
            StateFile(path).load()
    assert StateFile(tmp_path / "none.safetensors").load() is None


def test_no_file_of_a_run_is_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes on from a folder never unpickles, so that a stranger's folder runs nothing."""
    options = {"allocation": "uniform", "finetune": "pgd-at", "epochs": 1, "attack_steps": 1}
    original = RunFolder.keep
    fail_after("complete", monkeypatch)
    model, folder = tiny_resnet(num_classes=5), tmp_path / "run"
    with pytest.raises(CrashError):
        compress(model, own_data(), run_dir=folder, **options)
    (folder / "complete.json").unlink()
    states = sorted(path.name for path in folder.glob("*.safetensors"))
    assert states == ["pruned-1.safetensors", "tuned-1.safetensors"]
    assert {path.suffix for path in folder.iterdir()} == {".json", ".jsonl", ".safetensors"}
    monkeypatch.setattr(RunFolder, "keep", original)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, name, never)
    compress(model, own_data(), run_dir=folder, resume=True, **options)


def test_a_run_of_an_earlier_version_is_one_line_and_may_be_begun_anew(tmp_path: Path) -> None:
    model, folder = tiny_resnet(num_classes=5), tmp_path / "run"
    compress(model, own_data(), allocation="uniform", run_dir=folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("robust-prune/run/2", "robust-prune/run/1"))
    with pytest.raises(RunError, match="was written by an earlier version of robust-prune") as told:
        compress(model, own_data(), allocation="uniform", run_dir=folder, resume=True)
    assert "\n" not in str(told.value)
    compress(model, own_data(), allocation="uniform", run_dir=folder)
    assert RunFolder(folder).config()["schema"] == "robust-prune/run/2"


def test_files_of_a_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin({"settings": {"a": 1}})
    folder.record("step 1", {"epoch": 0, "loss": float("nan")})
    folder.record("step 1", {"epoch": 1, "loss": 2.0})
    folder.record("step 1", {"epoch": 1, "loss": 1.0})  # done again after a kill
    assert [line["loss"] for line in folder.metrics("step 1")] == [None, 1.0]
    (folder.path / ".draft.tmp").touch()
    folder.go_on({"settings": {"a": 1}})
    assert not (folder.path / ".draft.tmp").exists()
    folder.keep("part", {"x": float("inf")})
    assert folder.kept("part") == {"x": None}
    (folder.path / "part.json").write_text("{")
    with pytest.raises(RunError, match=r"part\.json: can't be read"):
        folder.kept("part")
    folder.config_path.write_text('{"schema": "of another time"}')
    with pytest.raises(RunError, match="not a run of this version"):
        folder.config()


def test_a_run_whose_deletion_was_cut_off_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin({"a": 1})
    folder.state("tuned-1").save({"x": torch.zeros(2)})

    def cut(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", cut)
        with pytest.raises(KeyboardInterrupt):
            folder.clear()
    assert not folder.exists()
    with pytest.raises(RunError, match="was being deleted; start anew"):
        folder.go_on({"a": 1})
    folder.begin({"a": 2})
    assert not folder.state("tuned-1").exists()
    assert folder.config()["a"] == 2
    # a kill within `begin` leaves a draft alone
    folder.clear()
    folder.path.mkdir()
    (folder.path / ".config.json.abc.tmp").touch()
    folder.begin({"a": 3})
    assert folder.config()["a"] == 3


def test_states_are_saved_as_seldom_as_they_are_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = StateFile(tmp_path / "s.safetensors", save_seconds=0.0)
    state.save({"x": torch.ones(3)})
    state._took = 10.0
    assert not state.due()
    state._took = 0.0
    assert state.due()


def test_several_steps_reach_the_budget_with_one_plan_that_can_be_replayed() -> None:
    model, data = tiny_resnet(num_classes=5), own_data()
    result = compress(model, data, prune_ratio=0.6, prune_steps=3, finetune="n-fgsm", epochs=4)
    assert result.plan.reached == pytest.approx(0.6, abs=0.02)
    assert [len(s["finetune"]["epochs"]) for s in result.report["steps"]] == [2, 2]
    assert len(result.report["finetune"]["epochs"]) == 3
    reached = [s["plan"]["pruned"]["macs"] for s in result.report["steps"]]
    assert reached == sorted(reached, reverse=True)
    shapes = {name: t.shape for name, t in result.model.state_dict().items()}
    replayed = compress(model, data, plan=result.plan, allocation="curve")
    assert {name: t.shape for name, t in replayed.model.state_dict().items()} == shapes
    one = compress(model, data, prune_ratio=0.6)
    assert one.plan.digest != result.plan.digest


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prune_steps": 0}, "1 or more"),
        ({"prune_steps": 3, "finetune": "trades", "epochs": 2}, "too few for 3 steps"),
        ({"emma": 1}, "'emma' is not known; did you mean 'ema'"),
    ],
)
def test_steps_and_options_that_can_not_be(wrong: dict[str, object], message: str) -> None:
    from robust_prune.errors import UsageError

    wrong = {"finetune": "trades", "epochs": 1, **wrong}
    with pytest.raises(UsageError, match=message):
        compress(tiny_resnet(num_classes=5), own_data(), **wrong)


def own_method(m: nn.Module, images: torch.Tensor, labels: torch.Tensor, attack: object):
    return nn.functional.cross_entropy(m(images), labels)


def test_the_command_goes_on_with_what_it_was_asked(
    run: Callable[..., tuple[int, str, str]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(run)
    asked = [
        "compress",
        "model.pt",
        "--ratio",
        0.5,
        "--finetune",
        OWN_METHOD,
    ]
    asked += ["--epochs", 1, "--n-eval", 4, "--eval", "pgd", "--allocation", "uniform"]
    code, _, err = run(*asked, "--out", "whole")
    assert code == 0, err
    original = RunFolder.keep
    fail_after("measured-before", monkeypatch, KeyboardInterrupt)
    code, _, err = run(*asked, "--out", "stopped")
    assert code == 130
    assert "status is 'pruned'" in err
    assert "compress --resume stopped goes on" in err
    monkeypatch.setattr(RunFolder, "keep", original)

    for more, message in (
        ([*asked[1:], "--out", "stopped"], "stopped goes on with it, --force starts anew"),
        (
            ["--resume", "stopped"],
            f"name it again with --finetune {OWN_METHOD}",
        ),
        (
            [
                "--resume",
                "stopped",
                "--finetune",
                OWN_METHOD,
                "--lr",
                1,
            ],
            "leave out --lr",
        ),
        (["--resume", "nowhere"], "no run there"),
        (["--resume", "whole"], "is complete"),
        ([], "name a model to compress"),
    ):
        code, out, err = run("compress", *more)
        assert (code, out) == (2, ""), (more, err)
        assert message in err
        assert err.count("\n") == 1

    code, _, err = run("compress", "--resume", "stopped", "--finetune", OWN_METHOD)
    assert code == 0, err
    mine = load("stopped/model-pruned.safetensors").state_dict()
    theirs = load("whole/model-pruned.safetensors").state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in mine.items())
    reports = [json.loads(Path(f"{d}/report.json").read_text()) for d in ("stopped", "whole")]
    assert reports[0]["plan"] == reports[1]["plan"]
    assert (
        reports[0]["evaluation"]["pruned"]["measurements"][1]["correct"]
        == (reports[1]["evaluation"]["pruned"]["measurements"][1]["correct"])
    )


def test_an_error_before_anything_was_pruned_leaves_nothing(
    run: Callable[..., tuple[int, str, str]],  # noqa: F811
) -> None:
    save(tiny_resnet(), "m.safetensors")
    code, _, err = run("compress", "m.safetensors", "--ratio", 0.9999)
    assert code == 5, err
    assert not Path("m-pruned").exists()


HOLDING = """
import sys, time
from pathlib import Path
from robust_prune.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_folder_are_refused_at_once(
    run: Callable[..., tuple[int, str, str]],  # noqa: F811
) -> None:
    save(tiny_resnet(num_classes=5), "m.safetensors")
    Path("m-pruned").mkdir()
    new = ["train", "--arch", "resnet18", "--model-kwargs", KWARGS, "--cifar-stem"]
    for folder, command in (
        ("m-pruned/run", ["compress", "m.safetensors", "--ratio", 0.5]),
        ("new.pt.run", [*new, "--data", "digits", "--input-size", "1,16,16", "--out", "new.pt"]),
    ):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDING, folder], stdout=subprocess.PIPE, text=True
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        code, _, err = run(*command)
        assert code == 2, err
        assert err.splitlines()[-1].endswith(
            "another run is at work there; wait for its end, or name another"
        )
        with pytest.raises(RunError, match="another run is at work"):
            compress(tiny_resnet(num_classes=5), own_data(), run_dir=folder)
        assert not Path(folder).exists()
        holder.kill()
        holder.wait()
        with locked(Path(folder)):  # a kill leaves the file, and no lock
            pass
        assert not list(Path(folder).parent.glob(".*.lock"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("where", ["fsync", "replace", "mkstemp"])
def test_a_full_or_read_only_disk_is_one_line_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, where: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    folder = RunFolder(tmp_path / "run")
    folder.begin({"a": 1})
    folder.keep("part", {"x": 1})
    folder.state("tuned-1").save({"x": torch.zeros(3)})
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    place = {"fsync": os, "replace": Path, "mkstemp": tempfile}[where]
    monkeypatch.setattr(place, where, fail)
    for work in (
        lambda: folder.keep("part", {"x": 2}),
        lambda: folder.record("part", {"epoch": 1}),
        lambda: folder.state("tuned-1").save({"x": torch.ones(3)}),
        lambda: save(tiny_resnet(), folder.path / "m.safetensors"),
        lambda: save(tiny_resnet(), folder.path / "m.pt"),
    ):
        with pytest.raises(ModelError, match=re.escape(os.strerror(code))) as told:
            work()
        assert "\n" not in str(told.value)
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_tensors_that_do_not_fit_are_an_error_of_the_disk() -> None:
    with pytest.raises(OSError, match=r"\S"):
        write_tensors({"x": torch.zeros(10**6)}, Path("/dev/full"))
