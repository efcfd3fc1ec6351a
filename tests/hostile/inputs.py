"""Broken and hostile files and values, each one line of a table."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from robust_prune.options import (
    BudgetOptions,
    FineTuningOptions,
    JudgingOptions,
    NewTrainingOptions,
    Options,
    PlanningOptions,
    RunOptions,
    SensitivityOptions,
    hints,
    stated,
)

Json = dict[str, Any]
Change = Callable[[Json], Any]
HUGE = 10**18


def with_header(header: Any, body: bytes = bytes(16), size: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw + body


def one(**fields: Any) -> Json:
    """A header of one good tensor of four float32, with some fields changed."""
    return {"weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **fields}}


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


SAFETENSORS: dict[str, bytes] = {
    "a length alone": struct.pack("<Q", 100),
    "half a length": b"\x10\0\0",
    "a header of no bytes": with_header(b"", size=0),
    "a header of a gigabyte": with_header(one(), size=2**30),
    "a header of 2^63 bytes": with_header(one(), size=2**63),
    "a header of 2^64 - 1 bytes": with_header(one(), size=2**64 - 1),
    "a header cut off": with_header(json.dumps(one()).encode()[:-5]),
    "a header that is no JSON": with_header(b"{weight}"),
    "a header that is no UTF-8": with_header(b'{"\xff\xfe": 1}'),
    "a list as header": with_header([1, 2]),
    "a number as header": with_header(5),
    "a header nested deep": with_header(nested(100_000)),
    "a tensor nested deep": with_header(b'{"weight":' + nested(50_000) + b"}"),
    "an unknown dtype": with_header(one(dtype="C999")),
    "a dtype of a number": with_header(one(dtype=32)),
    "no dtype": with_header({"weight": {"shape": [4], "data_offsets": [0, 16]}}),
    "no offsets": with_header({"weight": {"dtype": "F32", "shape": [4]}}),
    "three offsets": with_header(one(data_offsets=[0, 8, 16])),
    "offsets turned around": with_header(one(data_offsets=[16, 0])),
    "a negative offset": with_header(one(data_offsets=[-16, 0])),
    "broken offsets": with_header(one(data_offsets=[0, 15.5])),
    "offsets behind the end": with_header(one(data_offsets=[0, 1600], shape=[400])),
    "offsets of 2^64": with_header(one(data_offsets=[0, 2**64])),
    "a hole before the tensor": with_header(one(data_offsets=[16, 32]), bytes(32)),
    "bytes behind the tensor": with_header(one(), bytes(64)),
    "bytes that are missing": with_header(one(), bytes(3)),
    "a shape of more": with_header(one(shape=[5])),
    "a negative shape": with_header(one(shape=[-4])),
    "a shape of 10^18": with_header(one(shape=[HUGE])),
    "a shape that overflows": with_header(one(shape=[2**33, 2**33])),
    "a shape of text": with_header(one(shape="4")),
    "two tensors at one place": with_header({**one(), "bias": one()["weight"]}),
    "metadata of numbers": with_header({"__metadata__": {"a": 1}, **one()}),
    "metadata as a list": with_header({"__metadata__": [], **one()}),
    "a manifest of nothing": with_header({"__metadata__": {"robust_prune": ""}, **one()}),
    "a manifest nested deep": with_header(
        {"__metadata__": {"robust_prune": nested(100_000).decode()}, **one()}
    ),
    "no tensors": with_header({}, b""),
}


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return {
            "os.system": (os.system, ("touch ran",)),
            "eval": (eval, ("open('ran', 'w')",)),
            "exec": (exec, ("open('ran', 'w')",)),
            "open": (open, ("ran", "w")),
        }[self.name]


def zipped(data: bytes, name: str = "archive/data.pkl") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, data)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()


def pickles() -> Iterator[tuple[str, bytes]]:
    for code in ("os.system", "eval", "exec", "open"):
        for protocol in range(6):
            data = pickle.dumps({"state_dict": Runs(code)}, protocol)
            yield f"{code}, protocol {protocol}, bare", data
            yield f"{code}, protocol {protocol}, in torch's zip", zipped(data)
    yield "an INST opcode", b"(S'touch ran'\nios\nsystem\n."
    yield "a persistent id", zipped(b"\x80\x02(X\x03\x00\x00\x00runtq\x00Q.")
    yield "no end", zipped(b"\x80\x02}")
    yield "an archive without data", zipped(b"", "archive/other")
    yield "an empty archive", b"PK\x05\x06" + bytes(18)
    yield "an archive cut off", zipped(pickle.dumps({}, 2))[:-30]
    yield "a memo that is not there", b"\x80\x02h\xff."
    yield "a string of 2^31 bytes", b"\x80\x04\x8d" + struct.pack("<Q", 2**31) + b"x."
    yield "dots in names", zipped(b"\x80\x02cos.path\nos.system\n(X\t\x00\x00\x00touch rantR.")


PICKLES = dict(pickles())


def option_rows() -> Iterator[tuple[str, list[str]]]:
    """Each option with a range, just outside of it on both sides, and no number at all."""
    commands: Mapping[str, tuple[list[str], tuple[type[Options], ...]]] = {
        "compress": (
            ["none.pt", "--ratio", "0.5"],
            (BudgetOptions, PlanningOptions, FineTuningOptions, RunOptions),
        ),
        "train": (["--arch", "resnet18", "--data", "digits"], (NewTrainingOptions,)),
        "evaluate": (["none.pt"], (JudgingOptions,)),
        "sensitivity": (["none.pt"], (SensitivityOptions,)),
    }
    for command, (arguments, groups) in commands.items():
        for group in groups:
            for name, what in stated(group).items():
                if what.within is None or not what.shown:
                    continue
                flag = what.flag or f"--{name.replace('_', '-')}"
                whole = "float" not in str(hints(group)[name])
                for value in outside(what.within.low, what.within.high, whole):
                    yield f"{command} {flag} {value}", [command, *arguments, f"{flag}={value}"]


def outside(low: float, high: float, whole: bool) -> Iterator[str]:
    yield "x"
    yield "1.5" if whole else "nan"
    yield "1e400"
    if low > -math.inf:
        yield str(int(low) - 1)
    if high < math.inf:
        yield str(int(high) + 1)


OPTIONS = dict(option_rows())


def group(**fields: Any) -> Change:
    return lambda plan: plan["groups"][0].update(fields)


def top(**fields: Any) -> Change:
    return lambda plan: plan.update(fields)


def cost(**fields: Any) -> Change:
    return lambda plan: plan["pruned"].update(fields)


def text(content: str | bytes) -> Change:
    return lambda plan: content


PLANS: dict[str, Change] = {
    "10^9 channels": group(width=10**9),
    "10^9 channels kept": group(keep=[10**9]),
    "10^18 channels": group(width=HUGE),
    "a width of text": group(width="32"),
    "a width of a list": group(width=[32]),
    "a width of nothing": group(width=None),
    "a negative width": group(width=-32),
    "no channels": group(width=0, keep=[]),
    "nothing kept": group(keep=[]),
    "half a channel kept": group(keep=[0.5]),
    "channels of text": group(keep=["0", "1"]),
    "true as a channel": group(keep=[True]),
    "a negative channel": group(keep=[-1]),
    "a channel twice": group(keep=[1, 1]),
    "channels falling": group(keep=[3, 1]),
    "channels as a number": group(keep=3),
    "a name of a number": group(name=5),
    "an empty name": group(name=""),
    "a name of a megabyte": group(name="x" * 10**6),
    "mrs of text": group(mrs="high"),
    "a note of a list": group(note=[]),
    "code in a group": group(code="import os"),
    "the same group twice": lambda plan: plan["groups"].append(plan["groups"][0]),
    "groups as an object": top(groups={}),
    "groups of numbers": top(groups=[1]),
    "no groups": lambda plan: plan.pop("groups") and None,
    "no budget": lambda plan: plan.pop("budget") and None,
    "a budget of 2": top(budget={"target": "macs", "prune_ratio": 2}),
    "a budget of text": top(budget={"target": "macs", "prune_ratio": "half"}),
    "a budget on nothing": top(budget={"target": "time", "prune_ratio": 0.5}),
    "a budget as a number": top(budget=0.5),
    "a seed of text": top(seed="0"),
    "a negative seed": top(seed=-1),
    "a seed of 2^70": top(seed=2**70),
    "two sizes": top(input_size=[3, 32]),
    "a size of 10^9": top(input_size=[3, 10**9, 10**9]),
    "a negative size": top(input_size=[3, -32, 32]),
    "a broken size": top(input_size=[3, 32.5, 32]),
    "a size of text": top(input_size="3,32,32"),
    "a negative cost": cost(macs=-1),
    "a cost of text": cost(params="many"),
    "a cost of 10^30": cost(params=10**30),
    "more than the dense model": cost(macs=10**15),
    "an unknown cost": cost(watts=1),
    "ties of one": top(ties=[["a"]]),
    "ties of numbers": top(ties=[[1, 2]]),
    "heads of text": top(whole_heads="yes"),
    "notes as text": top(notes="none"),
    "notes of objects": top(notes=[{}]),
    "unprunable of text": top(unprunable=["fc"]),
    "another schema": top(schema="robust-prune/plan/9"),
    "a schema of a megabyte": top(schema="x" * 10**6),
    "an unknown field": top(code="import os"),
    "a plan in a plan": lambda plan: json.dumps({"plan": {"plan": plan}}),
    "a list": text("[]"),
    "a number": text("5"),
    "nothing": text("null"),
    "an empty file": text(""),
    "cut off": text('{"groups": ['),
    "not UTF-8": text(b'{"a": "\xff"}'),
    "UTF-16": text("{}".encode("utf-16")),
    "a binary file": text(bytes(range(256))),
    "nested deep": text(nested(100_000)),
    "objects nested deep": text(b'{"plan":' * 100_000),
    "a number of 100,000 digits": text("9" * 10**5),
    "not a number": text('{"seed": NaN}'),
}
FOREIGN: dict[str, Change] = {
    "another group": group(name="layer9.0.conv1"),
    "another width": lambda plan: plan["groups"][0].update(width=99),
    "an image of another size": top(input_size=[3, 8, 8]),
    "images of one channel": top(input_size=[1, 32, 32]),
    "other multiply-adds": cost(macs=12),
    "ties to nowhere": top(ties=[["nowhere:0", "layer9:0"]]),
    "a tie without a dimension": top(ties=[["fc", "fc"]]),
    "a tie of a dimension of 10^18": top(ties=[[f"net.fc.weight:{HUGE}", "net.fc.weight:0"]]),
    "a tie of two lengths": top(ties=[["net.fc.weight:0", "net.fc.weight:1"]]),
    "a group less": lambda plan: plan["groups"].pop() and None,
}


def tensors(n: int = 8) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def labels(n: int = 8) -> torch.Tensor:
    return torch.arange(n) % 10


def spoilt(value: float) -> torch.Tensor:
    images = tensors()
    images[3, 1, 2, 2] = value
    return images


DATA: dict[str, Any] = {
    "a label too large": (tensors(), labels() + 10),
    "a label of 10^12": (tensors(), labels() + 10**12),
    "a negative label": (tensors(), labels() - 5),
    "a label of -100": (tensors(), torch.full((8,), -100)),
    "broken labels": (tensors(), labels() + 0.5),
    "labels of text": (tensors(), list("abcdefgh")),
    "labels that are not finite": (tensors(), torch.full((8,), math.nan)),
    "too few labels": (tensors(), labels(7)),
    "too many labels": (tensors(), labels(9)),
    "labels of two dimensions": (tensors(), torch.zeros(8, 3, 2, dtype=torch.long)),
    "one label": (tensors(), torch.tensor(1)),
    "no images": (tensors(0), labels(0)),
    "images of two dimensions": (tensors().flatten(1), labels()),
    "images of five dimensions": (tensors()[None], labels()),
    "grey images": (tensors()[:, :1], labels()),
    "four channels": (torch.rand(8, 4, 32, 32), labels()),
    "channels last": (tensors().permute(0, 2, 3, 1), labels()),
    "images in 0 to 255": (tensors() * 255, labels()),
    "images around 0": (tensors() - 0.5, labels()),
    "not a number in an image": (spoilt(math.nan), labels()),
    "infinity in an image": (spoilt(math.inf), labels()),
    "a pixel of -1e-2": (spoilt(-1e-2), labels()),
    "images of text": (["a"] * 8, labels()),
    "nothing": (None, labels()),
    "a number": 5,
    "an empty list": [],
    "three of a kind": (tensors(), labels(), labels()),
    "batches of nothing": [(None, None)],
    "batches of images alone": [tensors(4)],
    "a dictionary": {"images": tensors(), "labels": labels()},
    "complex images": (tensors().to(torch.complex64), labels()),
}


def report(*path: str, value: Any) -> Change:
    def change(record: Json) -> None:
        for name in path[:-1]:
            record = record[name]
        record[path[-1]] = value

    return change


REPORTS: dict[str, Change] = {
    "the plan a list": report("plan", value=[]),
    "a plan of text": report("plan", value="mine"),
    "a plan of 10^9 channels": report("plan", "groups", value=[{"name": "a", "width": 10**9}]),
    "an image size of text": report("plan", "input_size", value="x"),
    "another plan's digest": report("plan_digest", value="000000000000"),
    "no digest": report("plan_digest", value=None),
    "costs of text": report("cost", "dense", value="few"),
    "a negative cost": report("cost", "pruned", "macs", value=-5),
    "costs that are not the plan's": report("cost", "pruned", "macs", value=1),
    "a status of a number": report("status", value=5),
    "a threat to nobody": report("threat", value={"norm": "l7", "eps": 1}),
    "an accuracy of 2": report("evaluation", value={"dense": {"n": 1, "accuracy": 2}}),
    "an evaluation of text": report("evaluation", value="good"),
    "measurements of text": report(
        "evaluation",
        value={"dense": {"n": 1, "split": "test", "seed": 0, "measurements": "good"}},
    ),
    "a self-check without a result": report("self_check", value={"done": True}),
    "a self-check of text": report("self_check", value="passed"),
    "reachable as text": report("reachable", value="all"),
    "reachable beyond all": report("reachable", value=7),
    "a grade of a number": report("calibration", value={"grade": 1, "labels": "", "advice": ""}),
    "data of a number": report("data_name", value=5),
}
RUNS: dict[str, str | bytes] = {
    "empty": "",
    "a list": "[]",
    "nothing": "null",
    "cut off": '{"schema": "robust-prune/run/2"',
    "no schema": "{}",
    "the schema a list": '{"schema": ["robust-prune/run/2"]}',
    "the schema an object": '{"schema": {"robust-prune/run/2": 1}}',
    "an earlier version's": '{"schema": "robust-prune/run/1", "arguments": {}}',
    "a later version's": '{"schema": "robust-prune/run/99", "arguments": {}}',
    "being deleted": '{"schema": "robust-prune/run/2", "deleted": true}',
    "arguments as a list": '{"schema": "robust-prune/run/2", "arguments": [1]}',
    "arguments as text": '{"schema": "robust-prune/run/2", "arguments": "--all"}',
    "no arguments": '{"schema": "robust-prune/run/2"}',
    "an unknown argument": '{"schema": "robust-prune/run/2", "arguments": {"rm": "-rf"}}',
    "code as a score": '{"schema": "robust-prune/run/2", "arguments": {"score": "os:system"}}',
    "code as a method": '{"schema": "robust-prune/run/2", "arguments": {"finetune": "os:system"}}',
    "a pickle to trust": '{"schema": "robust-prune/run/2", "arguments": {"trust_pickle": true}}',
    "nested deep": nested(100_000),
    "objects nested deep": b'{"arguments":' * 100_000,
    "not UTF-8": b'{"schema": "\xff"}',
    "a number of 100,000 digits": "9" * 10**5,
    "a pickle": pickle.dumps(Runs("os.system")),
}
FOLDERS: dict[str, str | bytes] = {
    "no JSON": "{",
    "a list": "[]",
    "nested deep": nested(100_000),
    "a number of 100,000 digits": '{"architecture": ' + "9" * 10**5 + "}",
    "no architecture": "{}",
    "an architecture of a number": '{"architecture": 5}',
    "an unknown architecture": '{"architecture": "../../etc/passwd"}',
    "classes of text": '{"architecture": "resnet18", "num_classes": "ten"}',
    "negative classes": '{"architecture": "resnet18", "num_classes": -5}',
    "10^12 classes": '{"architecture": "resnet18", "num_classes": 1000000000000}',
    "arguments as a list": '{"architecture": "resnet18", "num_classes": 10, "model_args": [1]}',
    "configuration as text": '{"architecture": "resnet18", "num_classes": 10, '
    '"pretrained_cfg": "x"}',
    "a mean of text": '{"architecture": "resnet18", "num_classes": 10, '
    '"pretrained_cfg": {"mean": "x", "std": "y"}}',
    "not UTF-8": b'{"architecture": "\xff"}',
}
