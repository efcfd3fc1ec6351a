"""Every broken or hostile input: one line, the right exit code, nothing run, nothing left."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import robust_prune as rp
from robust_prune.cli import main
from robust_prune.errors import RobustPruneError
from robust_prune.modules import ImageModel
from tests.conftest import tiny_resnet
from tests.data.test_pictures import KINDS, broken, image_folder
from tests.hostile.inputs import (
    DATA,
    FOLDERS,
    FOREIGN,
    OPTIONS,
    PICKLES,
    PLANS,
    REPORTS,
    RUNS,
    SAFETENSORS,
)

Refused = Callable[..., str]
TABLES = (SAFETENSORS, PICKLES, OPTIONS, PLANS, FOREIGN, DATA, REPORTS, RUNS, FOLDERS)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str, bytes]:
    """A pruned file with its report, the plan, and the dense file."""
    folder, model = tmp_path_factory.mktemp("good"), tiny_resnet()
    result = rp.compress(
        model, None, prune_ratio=0.4, allocation="uniform", score="l2", calibration_images=8
    )
    file = rp.save(result.model, folder / "p.safetensors", result.report)
    dense = rp.save(model, folder / "m.safetensors")
    return file.read_bytes(), result.plan.to_json(), dense.read_bytes()


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Run a command that must fail with this code, in one line, and leave nothing behind."""
    monkeypatch.chdir(tmp_path)

    def refused_(code: int, *arguments: str) -> str:
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
        monkeypatch.setattr(sys, "argv", ["robust-prune", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        told = capsys.readouterr()
        assert caught.value.code == code, told.err
        assert_one_line(told.err.removesuffix("\n").removeprefix("error: "))
        assert told.err.startswith("error: ")
        after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
        assert after == before
        return told.err

    return refused_


def assert_one_line(message: str) -> None:
    assert message
    assert "\n" not in message
    assert len(message) < 1200
    assert "a fault of robust-prune" not in message
    assert "Traceback" not in message


def test_the_tables_are_long_and_hold_no_input_twice() -> None:
    assert sum(map(len, TABLES)) >= 150
    for table in (SAFETENSORS, PICKLES, OPTIONS, RUNS, FOLDERS):
        assert len({str(value) for value in table.values()}) == len(table)


@pytest.mark.parametrize("name", list(SAFETENSORS))
def test_safetensors(name: str, refused: Refused) -> None:
    Path("a.safetensors").write_bytes(SAFETENSORS[name])
    assert "a.safetensors" in refused(3, "info", "a.safetensors", "--arch", "resnet18")


@pytest.mark.parametrize("name", list(PICKLES))
def test_pickles(name: str, refused: Refused) -> None:
    Path("a.pt").write_bytes(PICKLES[name])
    assert "a.pt" in refused(3, "info", "a.pt", "--arch", "resnet18")


@pytest.mark.parametrize("name", list(OPTIONS))
def test_options(name: str, refused: Refused) -> None:
    flag, _, value = OPTIONS[name][-1].partition("=")
    message = refused(2, *OPTIONS[name])
    assert "no such file" not in message, "the file is opened before the options are checked"
    shown = {value, f"{float('nan' if value == 'x' else value):g}"}
    assert any(word in message for word in shown | {flag}), message


def changed(plain: str, change: Callable[[Any], Any]) -> bytes:
    """The JSON with a change, or what the change gives instead."""
    data = json.loads(plain)
    new = change(data)
    if new is None:
        return json.dumps(data).encode()
    return new if isinstance(new, bytes) else str(new).encode()


@pytest.mark.parametrize("name", list(PLANS))
def test_plans(name: str, pruned: tuple[bytes, str, bytes], refused: Refused) -> None:
    Path("plan.json").write_bytes(changed(pruned[1], PLANS[name]))
    assert "plan.json" in refused(5, "compress", "none.pt", "--plan", "plan.json")


@pytest.mark.parametrize("name", list(FOREIGN))
def test_plans_of_other_networks(
    name: str, pruned: tuple[bytes, str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = rp.PruningPlan.from_json(changed(pruned[1], FOREIGN[name]).decode())
    model = tiny_resnet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RobustPruneError) as caught:
        rp.prune_(model, plan)
    assert_one_line(str(caught.value))
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in before.items()
    }


@pytest.fixture(scope="module")
def net() -> ImageModel:
    return tiny_resnet()


@pytest.mark.parametrize("name", list(DATA))
def test_images_and_labels(name: str, net: ImageModel) -> None:
    with pytest.raises(RobustPruneError) as caught:
        rp.evaluate(net, DATA[name], threat=rp.ThreatModel.linf("8/255"), attack="pgd", n=8)
    assert_one_line(str(caught.value))


@pytest.mark.parametrize("name", list(REPORTS))
def test_reports(name: str, pruned: tuple[bytes, str, bytes], refused: Refused) -> None:
    file = pruned[0]
    size = struct.unpack("<Q", file[:8])[0]
    header = json.loads(file[8 : 8 + size])
    record = changed(header["__metadata__"]["robust_prune"], REPORTS[name]).decode()
    raw = json.dumps({**header, "__metadata__": {"robust_prune": record}}).encode()
    Path("p.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + file[8 + size :])
    assert "p.safetensors" in refused(3, "info", "p.safetensors")


@pytest.mark.parametrize("name", list(RUNS))
@pytest.mark.parametrize("command", ["compress", "train"])
def test_folders_of_runs(command: str, name: str, refused: Refused) -> None:
    folder, content = Path("a/run") if command == "compress" else Path("a.pt.run"), RUNS[name]
    folder.mkdir(parents=True)
    raw = content if isinstance(content, bytes) else content.encode()
    (folder / "config.json").write_bytes(raw)
    named = folder.parent if command == "compress" else folder
    refused(2, command, "--resume", str(named))


@pytest.mark.parametrize("name", list(FOLDERS))
def test_folders_of_the_hub(name: str, refused: Refused) -> None:
    folder, content = Path("hub"), FOLDERS[name]
    folder.mkdir()
    (folder / "config.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    weights = {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    assert "hub" in refused(3, "info", "hub")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_pictures(
    kind: str, pruned: tuple[bytes, str, bytes], refused: Refused, tmp_path: Path
) -> None:
    folder = image_folder(Path("data"), {str(k): 20 * k for k in range(10)})
    (folder / "test" / "3" / "0.png").write_bytes(broken(kind, tmp_path))
    Path("m.safetensors").write_bytes(pruned[2])
    command = ["evaluate", "m.safetensors", "--data", "data", "--eval", "pgd", "--n-eval", "20"]
    assert "data/test/3/0.png" in refused(4, *command)


def test_damaged_pictures_are_counted_in_the_result(
    pruned: tuple[bytes, str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = image_folder(Path("data"), {str(k): 20 * k for k in range(10)})
    (folder / "test" / "3" / "0.png").write_bytes(b"")
    Path("m.safetensors").write_bytes(pruned[2])
    command = "--json evaluate m.safetensors --data data --eval pgd --skip-unreadable"
    monkeypatch.setattr(sys, "argv", ["robust-prune", *command.split()])
    with pytest.raises(SystemExit) as caught:
        main()
    told = capsys.readouterr()
    assert not caught.value.code, told.err
    assert "1 of 20 test pictures can't be read and were left out: data/test/3/0.png" in told.err
    result = json.loads(told.out)
    assert (result["n"], result["left_out"]) == (19, {"train": 0, "test": 1})


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
    ids=["Python", "GPU", "CPU"],
)
def test_memory_that_does_not_suffice(
    error: Exception,
    pruned: tuple[bytes, str, bytes],
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    Path("m.safetensors").write_bytes(pruned[2])
    monkeypatch.setattr("torch.nn.Module.load_state_dict", full)
    message = refused(1, "info", "m.safetensors")
    assert "memory does not suffice" in message
    assert "--input-size" in message
