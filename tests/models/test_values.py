"""Plain values load without trust; nothing of a file runs, and no size is believed."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import io
import pickle
import random
import struct
import types
import uuid
import warnings
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch

from robust_prune import load
from robust_prune.errors import ModelError, UnsafeFileError
from robust_prune.models.reading import read
from tests.models.networks import GIVEN, IDENTITY, network, opened, same

NET = network()
STATE = NET.state_dict()
PLAIN: dict[str, Any] = {
    "number": np.float64(51.5),
    "array": np.zeros(3),
    "array by columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "array of objects": np.array([{"a": 1}, None], dtype=object),
    "array of text": np.array(["a", "bc"]),
    "array of records": np.zeros(2, dtype=[("a", "f4")]),
    "bool": np.bool_(True),
    "type": np.float32,
    "random state": (np.random.get_state(), random.getstate(), torch.get_rng_state()),
    "defaultdict": collections.defaultdict(list, loss=[1.0]),
    "nested defaultdict": collections.defaultdict(dict, a={"b": np.int64(1)}),
    "counter": collections.Counter("aab"),
    "deque": collections.deque([1.0, 2.0], maxlen=3),
    "path": PurePosixPath("runs"),
    "real path": Path("/runs"),
    "date": datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
    "duration": datetime.timedelta(1),
    "decimal": decimal.Decimal("1.5"),
    "uuid": uuid.UUID(int=5),
    "namespace": argparse.Namespace(inner=types.SimpleNamespace(path=Path("x"))),
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "complex": 1 + 2j,
    "range": range(10**12),
    "slice": slice(1, 2),
    "large number": 10**50,
}


@pytest.mark.parametrize("name", list(PLAIN))
def test_plain_values_beside_the_weights_need_no_trust(name: str, tmp_path: Path) -> None:
    model, _ = opened(tmp_path, {"state_dict": STATE, "note": PLAIN[name]}, **IDENTITY)
    assert same(model, NET)


def test_the_values_that_count_are_the_same(tmp_path: Path) -> None:
    values = {
        "f8": np.arange(6.0).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big end first": np.arange(3, dtype=">f4"),
        "f2": np.ones(2, np.float16),
        "i8": np.arange(4).reshape(1, 2, 2),
        "empty": np.zeros((0, 3)),
    }
    torch.save({**values, "inner": argparse.Namespace(a=np.float64(0.1), b=3)}, tmp_path / "a.pt")
    content = read(tmp_path / "a.pt").content
    for name, value in values.items():
        assert np.array_equal(content.tensors[name].numpy(), value)
    assert content.settings["inner"] == {"a": 0.1, "b": 3}


class Kind(enum.Enum):
    ONE = 1


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_everything_else_stays_refused(tmp_path: Path) -> None:
    for value in (Kind.ONE, open, np.matrix([[1]]), np.ma.array([1]), io.BytesIO(), Path.touch):
        with pytest.raises(UnsafeFileError, match="--trust-pickle"):
            opened(tmp_path, {"state_dict": STATE, "note": value})


def pickled(lines: bytes) -> bytes:
    """A pickle of protocol 2 that gives back what these instructions leave."""
    return b"\x80\x02" + lines + b"."


def as_torch_file(path: Path, data: bytes) -> Path:
    """An archive as torch.save writes it, around another pickle."""
    torch.save({"a": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)
    return path


def calls(name: str, arguments: bytes, state: bytes = b"") -> bytes:
    """Call a name of a module, then fill what came out with a state."""
    module, _, attribute = name.rpartition(".")
    build = state + b"b" if state else b""
    return f"c{module}\n{attribute}\n".encode() + arguments + b"R" + build


NUMBER = b"\x8a\x08" + struct.pack("<q", 10**13)
HOSTILE = {
    "a call": calls("os.system", b"(X\x04\x00\x00\x00truet"),
    "a builtin": calls("builtins.eval", b"(X\x04\x00\x00\x001+1 t"),
    "getattr": calls("builtins.getattr", b"(X\x01\x00\x00\x00aX\x01\x00\x00\x00bt"),
    "an import": calls("importlib.import_module", b"(X\x04\x00\x00\x00thist"),
    "a method of a path": calls("pathlib.Path.touch", b"(X\x01\x00\x00\x00at"),
    "a stand-in's own class": calls("robust_prune.models.values.Kept", b"(t"),
    "numpy's loader": calls("numpy.load", b"(X\x01\x00\x00\x00at"),
    "an array of 10^13 entries": calls("numpy.ndarray", b"(" + NUMBER + b"\x85t"),
    "a bytearray of 10^13": calls("builtins.bytearray", b"(" + NUMBER + b"t"),
    "a list of 10^13": calls("builtins.list", b"(cbuiltins\nrange\n(" + NUMBER + b"tRt"),
    "attributes of a class": b"cargparse\nNamespace\n}X\x01\x00\x00\x00aK\x01sb",
    "a dtype of objects over bytes": calls(
        "numpy._core.multiarray.scalar",
        b"("
        + calls("numpy.dtype", b"(X\x02\x00\x00\x00O8K\x00K\x01t")
        + b"X\x08\x00\x00\x0012345678t",
    ),
    "weights that only claim to be": calls("torch.FloatTensor", b"(" + NUMBER + b"t"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_pickles_do_nothing(name: str, tmp_path: Path) -> None:
    path = as_torch_file(tmp_path / "a.pt", pickled(HOSTILE[name]))
    with pytest.raises(ModelError) as caught:
        load(path, **GIVEN)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


def test_a_tensor_larger_than_its_file_is_refused_before_it_is_made(tmp_path: Path) -> None:
    weights = torch.zeros(1).expand(10**6, 10**6)
    with pytest.raises(ModelError, match=r"claims 4,000,000,000,000 bytes, the whole file has"):
        opened(tmp_path, {"state_dict": STATE | {"conv1.weight": weights}})
    shared = torch.zeros(2**18)
    with pytest.raises(ModelError, match="its tensors claim"):
        opened(tmp_path, {f"layer{i}": shared.view(512, 512) for i in range(200)})


def test_data_that_leads_back_to_itself_is_read_once(tmp_path: Path) -> None:
    nest: list[Any] = [STATE]
    for _ in range(60):
        nest = [nest, nest, nest]
    loop: dict[str, Any] = {"state_dict": STATE}
    loop["again"] = loop
    assert same(opened(tmp_path, loop, **IDENTITY)[0], NET)
    with pytest.raises(ModelError, match="no weights found"):
        opened(tmp_path, {"deep": nest})


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    path = as_torch_file(tmp_path / "a.pt", pickled(b"}"))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/9", bytes(10**8))
    with pytest.raises(ModelError, match="would unpack to"):
        load(path, **GIVEN)


@pytest.mark.filterwarnings("error")
def test_programs_are_named_for_what_they_are(tmp_path: Path) -> None:
    net = torch.nn.Conv2d(3, 8, 3)
    images = torch.rand(1, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net, images).save(str(tmp_path / "a.pt"))
    with pytest.raises(ModelError, match="a TorchScript archive") as caught:
        load(tmp_path / "a.pt", **GIVEN)
    assert "weights_only" not in str(caught.value)
    with zipfile.ZipFile(tmp_path / "b.pt2", "w") as archive:
        archive.writestr("b/archive_format", "pt2")
    with pytest.raises(ModelError, match=r"a program of torch\.export"):
        load(tmp_path / "b.pt2", **GIVEN)


def test_another_pickle_protocol_is_named(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt", pickle_protocol=4)
    with pytest.raises(UnsafeFileError, match="another pickle protocol"):
        load(tmp_path / "a.pt", **GIVEN)
    assert same(load(tmp_path / "a.pt", trust_pickle=True, **GIVEN, **IDENTITY), NET)
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"a": 1}, protocol=5))
    with pytest.raises(ModelError):
        load(tmp_path / "b.pt", **GIVEN)
