"""What reads the files of strangers, and small valid files whose bytes are then changed."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from robust_prune.errors import RobustPruneError
from robust_prune.files import write_state
from robust_prune.graph import ModelGraph
from robust_prune.models.manifest import METADATA_KEY, parse_manifest
from robust_prune.models.reading import read
from robust_prune.pipeline import RunFolder, StateFile
from robust_prune.report import check_record
from robust_prune.types import ModelSpec, PruningPlan, to_plain
from tests.conftest import OwnNet
from tests.graph.test_graph import random_plan

PREFIX = "robust-prune-fuzz-"  # of folders for the files that are read
SECONDS = 5.0  # that one small file may take on a busy machine
TENSORS = {"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3)}
# what reading may never do, as Python's own audit names it
FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"),
    *("socket.connect", "urllib.Request", "os.remove", "os.rename", "compile"),
)
_seen: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event == "compile" and _imports_torch():
        return
    writes = event == "open" and "w" in str(arguments[1]) and PREFIX not in str(arguments[0])
    if writes or event in FORBIDDEN:
        _seen.append(f"{event} {arguments}"[:200])


def _imports_torch() -> bool:
    """Whether a module of torch's own is being imported, as it does at its first use."""
    frame: Any = sys._getframe()
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if frame.f_code.co_name == "<module>" and name.partition(".")[0] == "torch":
            return True
        frame = frame.f_back
    return False


sys.addaudithook(_audit)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Fail where what runs inside executes something, writes a file, or takes too long."""
    global _seen
    _seen, start = [], time.monotonic()
    found = _seen
    try:
        yield
    finally:
        took, _seen = time.monotonic() - start, None
        assert not found, f"reading did what only code does: {found}"
        assert took < SECONDS, f"reading took {took:.1f} s"


class Folder:
    """A folder for one file at a time."""

    def __init__(self) -> None:
        self._held = tempfile.TemporaryDirectory(prefix=PREFIX)
        self.path = Path(self._held.name)

    def file(self, name: str, data: bytes) -> Path:
        path = self.path / name
        path.write_bytes(data)
        return path


def text_of(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


def zipped(data: bytes) -> bytes:
    """What torch.save writes, around other pickle bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        for i, size in enumerate((48, 12)):
            archive.writestr(f"archive/data/{i}", bytes(size))
    return buffer.getvalue()


def headed(text: str, key: str) -> bytes:
    return safetensors.torch.save(TENSORS, {key: text})


def read_plan(data: bytes, folder: Folder) -> None:
    plan = PruningPlan.from_json(text_of(data))
    assert PruningPlan.from_json(plan.to_json()) == plan


def read_manifest(data: bytes, folder: Folder) -> None:
    found = parse_manifest(Path("x.safetensors"), text_of(data))
    if "plan" in found.record:
        with contextlib.suppress(ValueError):  # what `info` and reports catch
            check_record(found.record)


def read_checkpoint(data: bytes, folder: Folder) -> None:
    read(folder.file("x.pt", data))


def read_pickle(data: bytes, folder: Folder) -> None:
    read(folder.file("x.pt", zipped(data)))


def read_safetensors(data: bytes, folder: Folder) -> None:
    read(folder.file("x.safetensors", data))


def read_header(data: bytes, folder: Folder) -> None:
    read(folder.file("x.safetensors", struct.pack("<Q", len(data)) + data + bytes(60)))


def read_folder(data: bytes, folder: Folder) -> None:
    hub = folder.path / "hub"
    if not hub.exists():
        hub.mkdir()
        safetensors.torch.save_file(TENSORS, hub / "model.safetensors")
    (hub / "config.json").write_bytes(data)
    read(hub)


def read_shards(data: bytes, folder: Folder) -> None:
    hub = folder.path / "shards"
    hub.mkdir(exist_ok=True)
    safetensors.torch.save_file(TENSORS, hub / "a.safetensors")
    (hub / "model.safetensors.index.json").write_bytes(data)
    read(hub)


def read_run_config(data: bytes, folder: Folder) -> None:
    folder.file("config.json", data)
    RunFolder(folder.path).config()


def read_run_metrics(data: bytes, folder: Folder) -> None:
    folder.file("metrics.jsonl", data)
    RunFolder(folder.path).metrics("training")


def read_run_state(data: bytes, folder: Folder) -> None:
    StateFile(folder.file("state.safetensors", data)).load()


def read_run_tree(data: bytes, folder: Folder) -> None:
    raw = safetensors.torch.save(
        {"0": torch.zeros(2, 3, 1, 1)}, {"robust_prune_state": text_of(data)}
    )
    StateFile(folder.file("state.safetensors", raw)).load()


READERS: dict[str, Callable[[bytes, Folder], None]] = {
    name.removeprefix("read_"): reader
    for name, reader in list(globals().items())
    if name.startswith("read_")
}


def valid() -> dict[str, list[bytes]]:
    """Files that each reader accepts, each read once: what it compiles is compiled then."""
    found, folder = _valid(), Folder()
    for name, files in found.items():
        for data in files:
            with contextlib.suppress(RobustPruneError):
                READERS[name](data, folder)
    return found


def _valid() -> dict[str, list[bytes]]:
    torch.manual_seed(0)
    plan = random_plan(ModelGraph(OwnNet(), (3, 8, 8)), 0.5)
    spec = ModelSpec("timm", "resnet18", {"layers": [1, 1, 1, 1]}, num_classes=10)
    manifest = {
        "schema": "robust-prune/model/1",
        "model": to_plain(spec),
        "fields": {"fc": {"in_features": 4, "kernel_size": [3, 3]}},
        "threat": {"norm": "linf", "eps": "8/255"},
        "data": {"data": "digits", "split_seed": 0},
    }
    saved, state = io.BytesIO(), {"epoch": 1, "model": {"w": torch.zeros(2)}, "x": (1, None)}
    torch.save({"state_dict": TENSORS, "epoch": 3}, saved)
    with zipfile.ZipFile(saved) as archive:
        pickled = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    folder = Folder()
    write_state(folder.path / "s.safetensors", state)
    tensors = safetensors.torch.save(TENSORS)
    (size,) = struct.unpack("<Q", tensors[:8])
    tree = {"a": {"$tensor": ["0", False]}, "b": {"$tuple": [1, {"$float": "nan"}]}, "c": "x"}
    tree["d"] = {"$pairs": [[1, {"$tensor": ["0", True]}]]}
    old = io.BytesIO()
    torch.save(TENSORS, old, _use_new_zipfile_serialization=False)
    hub = {"architecture": "resnet18", "num_classes": 3, "model_args": {"in_chans": 1}}
    run = {"schema": "robust-prune/run/2", "arguments": {"ratio": 0.5}, "command": "compress"}
    return {
        "plan": [plan.to_json().encode()],
        "manifest": [
            json.dumps(manifest).encode(),
            json.dumps({**manifest, "plan": to_plain(plan), "cost": {}, "status": "x"}).encode(),
        ],
        "checkpoint": [saved.getvalue(), old.getvalue(), pickle.dumps({"a": [1.0]}, 2)],
        "pickle": [pickled, pickle.dumps({"state_dict": {}, "x": (1, "y", 2.5, None)}, 2)],
        "safetensors": [tensors, headed(json.dumps(manifest), METADATA_KEY)],
        "header": [tensors[8 : 8 + size]],
        "folder": [json.dumps(hub).encode(), b'{"model_type": "x", "pretrained_cfg": {}}'],
        "shards": [b'{"metadata": {}, "weight_map": {"fc.weight": "a.safetensors"}}'],
        "run_config": [json.dumps(run).encode()],
        "run_metrics": [b'{"part": "training", "epoch": 0, "loss": 1.5}\n{"part": "x"}\n'],
        "run_state": [(folder.path / "s.safetensors").read_bytes()],
        "run_tree": [json.dumps({"schema": "robust-prune/state/1", "state": tree}).encode()],
    }
