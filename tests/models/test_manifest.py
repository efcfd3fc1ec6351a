"""A manifest's fields are checked before use: one line with the path, whatever is in them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from robust_prune import load, save
from robust_prune.errors import ModelError
from robust_prune.graph import ModelGraph, prune_
from robust_prune.models.fitting import check_classes, check_runs
from tests.conftest import tiny_resnet
from tests.graph.test_graph import random_plan

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    model = tiny_resnet()
    prune_(model, random_plan(ModelGraph(model, (3, 32, 32)), 0.5))
    path = tmp_path_factory.mktemp("good") / "m.safetensors"
    record = {"threat": {"norm": "linf", "eps": 0.03}, "data": {"data": "cifar10"}}
    return save(model, path, record).read_bytes()


def with_manifest(good: bytes, change: Change, path: Path) -> Path:
    size = struct.unpack("<Q", good[:8])[0]
    header, tail = json.loads(good[8 : 8 + size]), good[8 + size :]
    manifest = json.loads(header["__metadata__"]["robust_prune"])
    changed = change(manifest)
    text = changed if isinstance(changed, str) else json.dumps(manifest)
    raw = json.dumps({**header, "__metadata__": {"robust_prune": text}}).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + tail)
    return path


def model(**fields: Any) -> Change:
    return lambda manifest: manifest["model"].update(fields)


def builder(**arguments: Any) -> Change:
    return lambda manifest: manifest["model"]["kwargs"].update(arguments)


def top(**fields: Any) -> Change:
    return lambda manifest: manifest.update(fields)


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else 1


def without_classes(manifest: dict[str, Any]) -> None:
    del manifest["model"]["num_classes"]
    manifest["model"]["kwargs"].pop("num_classes", None)


WRONG: dict[str, Change] = {
    "another schema": top(schema="robust-prune/model/2"),
    "no schema": lambda manifest: manifest.pop("schema") and None,
    "no model": lambda manifest: manifest.pop("model") and None,
    "the model a list": top(model=[]),
    "a source": model(source="os"),
    "the source a number": model(source=5),
    "no such network": model(arch="nothing"),
    "a name of megabytes": model(arch="x" * 10**6),
    "an unknown field": model(code="import os"),
    "no classes": model(num_classes=0),
    "no number of classes": without_classes,
    "other classes than in kwargs": model(num_classes=11),
    "10^12 classes": model(num_classes=10**12),
    "classes as text": model(num_classes="ten"),
    "a stem as text": model(cifar_stem="yes"),
    "a negative height": model(input_size=[3, -32, 32]),
    "two sizes": model(input_size=[3, 32]),
    "a size of 10^9": model(input_size=[3, 10**9, 10**9]),
    "a broken size": model(input_size=[3, 32.5, 32]),
    "a mean of text": model(mean=["a", "b", "c"]),
    "a mean alone": model(std=[]),
    "one value for three channels": model(mean=[0.5], std=[0.5]),
    "a std of zero": model(std=[0, 1, 1]),
    "arguments as a list": model(kwargs=[1]),
    "an unknown argument": builder(nothing=1),
    "a file to read": builder(checkpoint_path="/etc/passwd"),
    "10^9 channels": builder(channels=[10**9] * 4),
    "10^6 channels": builder(channels=[10**6] * 4),
    "10^9 blocks": builder(layers=[10**9, 1, 1, 1]),
    "10^6 blocks": builder(layers=[10**6, 1, 1, 1]),
    "arguments nested deep": builder(stem_width=nested(50)),
    "fewer channels than stored": builder(channels=[1, 1, 1, 1]),
    "fields as a number": top(fields={"layer1": 5}),
    "a field of 10^12": top(fields={"conv1": {"groups": 10**12}}),
    "a field that does not run": top(fields={"layer1.0.conv1": {"groups": 7}}),
    "a method as a field": top(fields={"layer1": {"forward": 3}}),
    "a switch as a field": top(fields={"layer1": {"training": 3}}),
    "a field of no module": top(fields={"nothing": {"groups": 1}}),
    "not finite": lambda m: json.dumps({**m, "fields": {"conv1": {"groups": float("nan")}}}),
    "a negative eps": top(threat={"norm": "linf", "eps": -1}),
    "an unknown norm": top(threat={"norm": "l7", "eps": 1}),
    "data as a number": top(data=5),
    "data of another kind": top(data={"data": 5}),
    "versions as a list": top(versions=[1]),
    "nested 200,000 deep": lambda manifest: "[" * 200_000 + "]" * 200_000,
    "objects 200,000 deep": lambda manifest: '{"a":' * 200_000 + "1" + "}" * 200_000,
    "a number of 100,000 digits": lambda m: json.dumps(m)[:-1] + ', "x": ' + "9" * 10**5 + "}",
    "empty": lambda manifest: " ",
    "cut off": lambda manifest: "{",
    "a list": lambda manifest: "[]",
    "nothing": lambda manifest: "null",
}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_manifest_is_refused_in_one_line_with_its_path(
    name: str, good: bytes, tmp_path: Path
) -> None:
    path = with_manifest(good, WRONG[name], tmp_path / "bad.safetensors")
    with pytest.raises(ModelError) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_the_number_of_classes_is_compared_with_the_weights(good: bytes, tmp_path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        del manifest["model"]["kwargs"]["num_classes"]
        manifest["model"]["num_classes"] = 100

    with pytest.raises(ModelError, match="10 outputs, and the model is said to have 100 classes"):
        load(with_manifest(good, change, tmp_path / "bad.safetensors"))


def test_what_a_report_holds_besides_is_kept(good: bytes, tmp_path: Path) -> None:
    from robust_prune.models import open_model

    change = top(anything={"deep": [1, 2, {"a": None}]}, status="pruned")
    _, record = open_model(with_manifest(good, change, tmp_path / "m.safetensors"))
    assert record["anything"] == {"deep": [1, 2, {"a": None}]}
    assert record["threat"]["eps"] == 0.03


def test_a_network_that_ends_before_a_classifier_is_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_resnet(num_classes=0)
    again = load(save(model, tmp_path / "m.safetensors"))
    assert again.spec.num_classes == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_a_network_without_a_classifier_has_to_run_and_no_more() -> None:
    model = tiny_resnet(num_classes=0)
    check_runs(model)
    check_classes(model)
    model.net.layer1 = torch.nn.Conv2d(7, 7, 1)
    with pytest.raises(ModelError):
        check_runs(model)
