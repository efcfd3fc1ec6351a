"""The command line: the three ways in, one line for each mistake, and what scripts rely on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from robust_prune import load, save
from robust_prune.cli import main
from robust_prune.models import open_model
from tests.conftest import TINY, OwnNet, randomize_, tiny_resnet
from tests.shortened import shorten

KWARGS = json.dumps(TINY)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in an empty folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run_(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["robust-prune", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run_


def train(run: Callable[..., tuple[int, str, str]], name: str = "model.pt") -> None:
    code, out, err = run(
        "train",
        "--arch",
        "resnet18",
        "--model-kwargs",
        KWARGS,
        "--cifar-stem",
        "--data",
        "digits",
        "--input-size",
        "1,16,16",
        "--epochs",
        1,
        "--attack-steps",
        1,
        "--eps",
        "0.06",
        "--out",
        name,
    )
    assert code == 0, err
    assert f"wrote {name}" in out


def test_train_then_the_bare_command(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch)
    train(run)
    # the bare command, but for the size of the evaluation
    code, out, err = run("compress", "model.pt", "--ratio", 0.5, "--n-eval", 6)
    assert code == 0, err
    assert "fine-tuning pgd-at, 3 epochs" in out
    assert "threat linf 0.06" in out
    assert "AutoAttack on 6 test images" in out
    report = json.loads(Path("model-pruned/report.json").read_text())
    assert report["status"] == "evaluated"
    assert report["data"]["data"] == "digits"
    for which in ("dense", "pruned"):
        attacks = [m["attack"] for m in report["evaluation"][which]["measurements"]]
        assert attacks == ["clean", "pgd", "autoattack"]
    pruned = load("model-pruned/model-pruned.safetensors")
    assert pruned(torch.rand(2, 1, 16, 16)).shape == (2, 10)
    assert Path("model-pruned/report.html").stat().st_size > 10_000

    code, out, err = run("compress", "model.pt", "--ratio", 0.5)
    assert (code, out) == (2, "")
    assert "--force" in err

    for command in ("info", "evaluate"):
        more = ["--eval", "pgd", "--n-eval", 20] if command == "evaluate" else []
        code, out, err = run(command, "model-pruned/model-pruned.safetensors", *more)
        assert code == 0, err
    code, out, err = run(
        "compress",
        "model.pt",
        "--plan",
        "model-pruned/report.json",
        "--quick",
        "--out",
        "again",
        "--eval",
        "pgd",
        "--n-eval",
        6,
    )
    assert code == 0, err
    again = json.loads(Path("again/report.json").read_text())
    assert again["plan"] == report["plan"]


def test_a_timm_checkpoint_without_data(run: Callable[..., tuple[int, str, str]]) -> None:
    torch.manual_seed(0)
    net = timm.create_model("lcnet_035", num_classes=10)
    torch.save({"arch": "lcnet_035", "state_dict": net.state_dict()}, "model.pt")
    code, out, err = run("compress", "model.pt", "--ratio", 0.5, "--calibration-images", 8)
    assert code == 0, err
    assert "stand-in photographs" in out
    assert "decided on stand-ins: expect up to" in out
    assert "normalisation assumed" in out
    assert "image size assumed" in out
    report = json.loads(Path("model-pruned/report.json").read_text())
    assert report["status"] == "pruned"
    assert any("stand-in photographs" in note for note in report["notes"])
    assert load("model-pruned/model-pruned.safetensors").net.conv_head.out_channels < 1280


def test_what_is_assumed_of_a_file_is_said_by_every_command(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    net = timm.create_model("lcnet_035", num_classes=10)
    torch.save({"arch": "lcnet_035", "state_dict": net.state_dict()}, "model.pt")
    for i in range(40):
        for split in ("train", "test"):
            folder = Path("pictures") / split / f"{i % 10}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (6 * i, 0, 0)).save(folder / f"{i}.png")
    small = ["--input-size", "3,32,32"]
    for command in (
        ["info", "model.pt", *small],
        ["sensitivity", "model.pt", *small, "--images", 4],
        ["evaluate", "model.pt", *small, "--data", "pictures", "--eval", "none", "--n-eval", 4],
    ):
        code, out, err = run(*command)
        assert code == 0, (command, err)
        assert "normalisation assumed" in out, command
    code, out, err = run("--json", *command)
    assert "normalisation assumed" in json.loads(out)["assumed"][0]


def test_an_error_of_given_code_names_its_line(run: Callable[..., tuple[int, str, str]]) -> None:
    Path("given.py").write_text(
        "def mine(model, images, labels, attack):\n    raise KeyError('x')\n"
    )
    train(run, name="digits.pt")
    more = ["--finetune", "given:mine", "--epochs", 1, "--eval", "none"]
    code, _, err = run("compress", "digits.pt", "--ratio", 0.3, "--calibration-images", 4, *more)
    assert code == 1
    assert "given.py, line 2: KeyError: 'x'" in err


def test_a_pickled_module_is_refused_in_one_line_then_compressed(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    torch.save(timm.create_model("lcnet_035", num_classes=4), "model.pt")
    code, out, err = run("compress", "model.pt", "--ratio", 0.5)
    assert (code, out) == (3, "")
    assert err.count("\n") == 1
    assert "--trust-pickle" in err
    assert not Path("model-pruned").exists()
    more = ["--trust-pickle", "--input-size", "3,64,64", "--calibration-images", 8]
    code, out, err = run("compress", "model.pt", "--ratio", 0.5, *more)
    assert code == 0, err
    assert load("model-pruned/model-pruned.safetensors")(torch.rand(1, 3, 64, 64)).shape == (1, 4)


def test_a_pickled_module_of_an_own_class_is_compressed_too(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    torch.save(OwnNet(width=32), "own.pt")
    code, out, err = run(
        "compress", "own.pt", "--ratio", 0.5, "--trust-pickle", "--input-size", "3,16,16"
    )
    assert code == 0, err
    assert "without normalisation" in out
    model = load("own-pruned/own-pruned.safetensors", model=OwnNet(width=32))
    assert model(torch.rand(1, 3, 16, 16)).shape == (1, 5)


def test_training_goes_on_against_the_threat_that_the_file_records(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    threat = {"norm": "l2", "eps": 0.5}
    save(
        tiny_resnet(in_chans=1),
        "m.safetensors",
        {"data": {"data": "digits", "input_size": [1, 8, 8]}, "threat": threat},
    )
    more = ["--epochs", 1, "--attack-steps", 1, "--input-size", "1,8,8"]
    code, out, err = run("train", "--from", "m.safetensors", *more)
    assert code == 0, err
    assert "l2 0.5" in out
    _, record = open_model("m-trained.safetensors")
    assert record["threat"] == threat
    code, out, err = run("train", "--from", "m.safetensors", *more, "--norm", "linf", "--force")
    assert code == 0, err
    assert "linf 8/255" in out


def test_images_of_an_own_class_have_the_size_that_is_asked_for(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    torch.save(OwnNet(width=12, classes=2), "own.pt")
    for place in ("train", "test"):
        for label, level in (("a", 50), ("b", 200)):
            folder = Path("images", place, label)
            folder.mkdir(parents=True)
            for i in range(12):
                Image.new("RGB", (16, 16), (level, level, i)).save(folder / f"{i}.png")
    command = ["compress", "own.pt", "--ratio", 0.3, "--trust-pickle", "--data", "images"]
    command += ["--quick", "--n-eval", 4, "--input-size", "3,24,24", "--allocation", "uniform"]
    code, _, err = run(*command)
    assert code == 0, err
    report = json.loads(Path("own-pruned/report.json").read_text())
    assert report["plan"]["input_size"] == [3, 24, 24]


def test_json_is_one_document_on_stdout(run: Callable[..., tuple[int, str, str]]) -> None:
    save(tiny_resnet(), "m.safetensors")
    few = ["--calibration-images", 8]
    code, out, err = run("compress", "m.safetensors", "--ratio", 0.3, "--json", *few)
    assert code == 0
    document = json.loads(out)
    assert document["report"]["status"] == "pruned"
    assert document["files"]["model"].endswith("m-pruned.safetensors")
    assert "stand-in photographs" in err
    code, out, err = run("info", "m.safetensors", "--json", "--quiet")
    assert json.loads(out)["cost"]["params"] == sum(p.numel() for p in tiny_resnet().parameters())
    assert err == ""


def test_sensitivity_writes_a_table_and_a_picture(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    save(tiny_resnet(num_classes=10), "m.safetensors")
    code, out, err = run("sensitivity", "m.safetensors", "--images", 8)
    assert code == 0, err
    assert "layer1.0.conv1" in out
    assert Path("m-mrs.png").read_bytes().startswith(b"\x89PNG")


def _prepare(folder: Path) -> None:
    """What the bad inputs below talk about."""
    save(tiny_resnet(), folder / "good.safetensors")
    torch.save(tiny_resnet().net.state_dict(), folder / "plain.pt")
    wide = randomize_(timm.create_model("resnet18", num_classes=10))
    torch.save(wide.state_dict(), folder / "wide.pt")
    (folder / "empty.pt").touch()
    (folder / "text.pt").write_text("hello")
    (folder / "cut.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:5000])
    torch.save({"epoch": 3}, folder / "noweights.pt")
    (folder / "folder").mkdir()
    (folder / "pictures" / "cats").mkdir(parents=True)
    (folder / "file").touch()
    (folder / "plan.json").write_text("{}")
    (folder / "notjson.json").write_text("{")


GOOD = ["compress", "good.safetensors", "--ratio", "0.5"]
BAD: dict[str, tuple[list[str], int, str]] = {
    "no such file": (["compress", "none.pt", "--ratio", "0.5"], 3, "none.pt: no such file"),
    "empty file": (["compress", "empty.pt", "--ratio", "0.5"], 3, "empty.pt: the file is empty"),
    "text file": (["compress", "text.pt", "--ratio", "0.5"], 3, "not a PyTorch or safetensors"),
    "cut file": (["compress", "cut.safetensors", "--ratio", "0.5"], 3, "not a readable safetens"),
    "no weights": (["compress", "noweights.pt", "--ratio", "0.5"], 3, "no weights found"),
    "a plain folder": (["compress", "folder", "--ratio", "0.5"], 3, "config.json"),
    "no architecture": (["compress", "plain.pt", "--ratio", "0.5"], 3, "--arch NAME"),
    "misspelt architecture": (
        ["compress", "plain.pt", "--ratio", "0.5", "--arch", "resnt18"],
        3,
        "did you mean resnet18",
    ),
    "other shapes": (
        ["compress", "wide.pt", "--ratio", "0.5", "--arch", "resnet34"],
        3,
        "check --arch",
    ),
    "kwargs are no JSON": (
        ["compress", "plain.pt", "--ratio", "0.5", "--arch", "resnet18", "--model-kwargs", "{x"],
        2,
        "not JSON",
    ),
    "unknown kwarg": (
        [
            "compress",
            "plain.pt",
            "--ratio",
            "0.5",
            "--arch",
            "resnet18",
            "--model-kwargs",
            '{"widht": 3}',
        ],
        3,
        "widht",
    ),
    "stem of a network without one": (
        ["compress", "plain.pt", "--ratio", "0.5", "--arch", "vgg16", "--cifar-stem"],
        3,
        "stem",
    ),
    "no ratio": (["compress", "good.safetensors"], 2, "--ratio 0.5"),
    "ratio and drop": ([*GOOD, "--max-drop", "1"], 2, "leave one out"),
    "drop without data": (["compress", "good.safetensors", "--max-drop", "1"], 4, "--data"),
    "plan and drop": (
        ["compress", "good.safetensors", "--max-drop", "1", "--plan", "none.json"],
        5,
        "no such plan",
    ),
    "drop of tuned models without tuning": (
        ["compress", "good.safetensors", "--max-drop", "1", "--max-drop-of", "tuned"],
        2,
        "needs --max-drop, and fine-tuning",
    ),
    "ratio in percent": ([*GOOD[:3], "50"], 2, "between 0 and 1"),
    "ratio is no number": ([*GOOD[:3], "half"], 2, "'--ratio'"),
    "ratio out of reach": ([*GOOD[:3], "0.9999"], 5, "at most"),
    "unknown target": ([*GOOD, "--target", "flops"], 2, "macs, params, channels"),
    "unknown rule": ([*GOOD, "--allocation", "best"], 2, "curve, inverted, mrs, uniform"),
    "unknown option": ([*GOOD, "--fast"], 2, "--fast"),
    "unknown layer": ([*GOOD, "--protect", "layer9"], 2, "no layer is called 'layer9'"),
    "eps without a slash": ([*GOOD, "--eps", "8"], 2, "8/255"),
    "unknown norm": ([*GOOD, "--norm", "l7"], 2, "linf, l2"),
    "mean of two channels": ([*GOOD, "--mean", "0.5,0.5"], 2, "one value per channel"),
    "mean is no number": ([*GOOD, "--mean", "a,b,c"], 2, "numbers separated by commas"),
    "size is no size": ([*GOOD, "--input-size", "32"], 2, "channels,height,width"),
    "data is nowhere": ([*GOOD, "--data", "cifar11"], 4, "cifar10"),
    "data is no image folder": ([*GOOD, "--data", "pictures"], 4, "there is cats"),
    "data is not downloaded": (
        [*GOOD, "--data", "cifar10", "--data-root", "folder"],
        4,
        "--download",
    ),
    "classes do not fit": (
        ["compress", "classes.safetensors", "--ratio", "0.5", "--data", "digits", "--quick"],
        4,
        "7 outputs",
    ),
    "fine-tuning without data": ([*GOOD, "--finetune", "trades"], 2, "needs data"),
    "unknown method": (
        [*GOOD, "--data", "digits", "--finetune", "free"],
        2,
        "pgd-at, rslad, trades",
    ),
    "evaluation without data": ([*GOOD, "--eval", "pgd"], 2, "needs data"),
    "quick and fine-tuning": ([*GOOD, "--quick", "--finetune", "trades"], 2, "--quick"),
    "out is a file": ([*GOOD, "--out", "file"], 2, "is a file"),
    "out of nothing": ([*GOOD, "--out", ""], 2, "--out is empty"),
    "data of nothing": ([*GOOD, "--data="], 2, "--data is empty"),
    "a model of nothing": (["compress", "", "--ratio", "0.5"], 2, "an argument is empty"),
    "no such plan": (["compress", "good.safetensors", "--plan", "none.json"], 5, "no such plan"),
    "plan is no plan": (["compress", "good.safetensors", "--plan", "plan.json"], 5, "malformed"),
    "plan is no JSON": (["compress", "good.safetensors", "--plan", "notjson.json"], 5, "not JSON"),
    "plan is a folder": (
        ["compress", "good.safetensors", "--plan", "folder"],
        5,
        "folder: can't be read",
    ),
    "training without data": (["train", "--arch", "resnet18"], 2, "--data"),
    "training nothing": (["train", "--data", "digits"], 2, "--arch NAME"),
    "evaluating without data": (["evaluate", "good.safetensors"], 2, "--data"),
    "picture of no kind": (["sensitivity", "good.safetensors", "--plot", "a.doc"], 2, ".png"),
}


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    _prepare(folder)
    model = tiny_resnet(num_classes=7)
    save(model, folder / "classes.safetensors")
    return folder


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_gets_one_line_and_leaves_nothing(
    name: str,
    bad_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, code, message = BAD[name]
    monkeypatch.chdir(bad_folder)
    monkeypatch.setattr(sys, "argv", ["robust-prune", *arguments])
    before = sorted(p.relative_to(bad_folder) for p in bad_folder.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main()
    captured = capsys.readouterr()
    assert caught.value.code == code, captured.err
    last = captured.err.strip().splitlines()
    assert len(last) == 1, captured.err
    assert last[0].startswith("error: ")
    assert message in last[0]
    assert sorted(p.relative_to(bad_folder) for p in bad_folder.rglob("*")) == before


def test_help_is_fast_and_does_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['robust-prune', '--help']\n"
        "from robust_prune.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules\n"
    )
    # each beside a measure of the machine, as what else it does changes from one to the next
    assert min(_timed(code) / _machine_factor() for _ in range(5)) < 0.4


def _timed(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - start


def _machine_factor() -> float:
    """1 where typer and rich are there in 0.18 s, more on a machine that is busy or slow."""
    return max(1.0, min(_timed("import typer.rich_utils") for _ in range(2)) / 0.18)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_request_to_stop_in_training_keeps_the_best_epoch(
    name: str, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from robust_prune.finetune.loop import _Run

    original = _Run.batches

    def batches(self: Any, asked: Callable[[], bool]) -> None:
        if self.epoch == 2 and not resumed:
            signal.raise_signal(getattr(signal, name))
        original(self, asked)

    resumed: list[int] = []
    monkeypatch.setattr(_Run, "batches", batches)
    command = [
        "train",
        "--arch",
        "resnet18",
        "--model-kwargs",
        KWARGS,
        "--cifar-stem",
        "--data",
        "digits",
        "--input-size",
        "1,16,16",
        "--epochs",
        2,
        "--attack-steps",
        1,
        "--out",
        "m.safetensors",
    ]
    code, _, err = run(*command)
    assert code == 130
    assert "m.safetensors holds the best epoch so far" in err
    assert "train --resume m.safetensors.run goes on" in err
    assert load("m.safetensors")(torch.rand(1, 1, 16, 16)).shape == (1, 10)

    resumed.append(1)
    code, out, err = run("train", "--resume", "m.safetensors.run", "--epochs", 3)
    assert (code, out) == (2, "")
    assert "leave out --epochs" in err
    code, out, err = run("train", "--resume", "m.safetensors.run")
    assert code == 0, err
    assert not Path("m.safetensors.run").exists()
    code, _, err = run(*[a if a != "m.safetensors" else "whole.safetensors" for a in command])
    assert code == 0, err
    whole, again = load("whole.safetensors"), load("m.safetensors")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())


def test_a_missing_option_of_several_values_is_named_in_one_line(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    """typer's own message has a line for each value."""
    code, _, err = run("export", "m.safetensors")
    assert code == 2
    assert err.startswith("error: Missing option '--format'")
    assert err.count("\n") == 1
