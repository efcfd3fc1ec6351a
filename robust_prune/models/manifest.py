"""The manifest of our own model files: its schema, checked before anything in it is used."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import safetensors.torch
from torch import Tensor

from robust_prune.errors import ModelError, UsageError, first_line
from robust_prune.files import atomic, write_tensors
from robust_prune.modules import TAILS, EmptyForm, Fields
from robust_prune.types import ModelSpec, ThreatModel
from robust_prune.untrusted import parse_json

SCHEMA = "robust-prune/model/1"
METADATA_KEY = "robust_prune"
LARGEST_NUMBER = 2**31
LARGEST_ARGUMENT, DEEPEST_ARGUMENT = 2**20, 8  # of a builder: some make lists of such a length

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
Pixels = Annotated[int, msgspec.Meta(ge=1, le=2**16)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=LARGEST_NUMBER)]
PerChannel = Annotated[list[float], msgspec.Meta(max_length=2**12)]
Number = int | float


class _Model(msgspec.Struct, forbid_unknown_fields=True):
    source: Literal["timm", "torchvision", "custom"]
    arch: Name
    kwargs: dict[str, Any] = {}
    cifar_stem: bool = False
    num_classes: Count | msgspec.UnsetType = msgspec.UNSET  # 0: it ends before a classifier
    input_size: tuple[Pixels, Pixels, Pixels] | None = None
    mean: PerChannel = []
    std: PerChannel = []


class _Threat(msgspec.Struct):
    norm: Name
    eps: float | str


class _Data(msgspec.Struct):
    data: str | None = None
    data_root: str | None = None
    split_seed: Count = 0


class _Empty(msgspec.Struct, forbid_unknown_fields=True):
    skip: Annotated[str, msgspec.Meta(max_length=500)] = ""
    tail: Literal[tuple(TAILS)] = ""  # type: ignore[valid-type]
    last: bool = False


class _Manifest(msgspec.Struct):
    """Fields that are read again; what a report holds besides is only shown."""

    schema: Literal["robust-prune/model/1"]
    model: _Model
    fields: dict[str, dict[str, Number | list[int]]] = {}
    empty: dict[Name, _Empty] = {}
    versions: dict[str, str] = {}
    threat: _Threat | None = None
    data: _Data | None = None
    status: str | None = None


@dataclass(frozen=True)
class Manifest:
    """A manifest that has been checked: how to build the network, and the record as stored.

    `fields` are the numbers that pruning has changed in modules, `empty` the blocks without branch.
    """

    spec: ModelSpec
    fields: Fields
    empty: Mapping[str, EmptyForm]
    record: Mapping[str, Any]


def parse_manifest(path: Path, text: str) -> Manifest:
    """Read and check a manifest.

    Raises:
        ModelError: it is not JSON, of another version, or a field has another type or range.
    """
    try:
        record = parse_json(text)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        if "schema" in record and record["schema"] != SCHEMA:
            raise ModelError(
                f"{path}: schema {str(record['schema'])[:100]!r}; this version reads {SCHEMA!r}"
            )
        found = msgspec.convert(record, _Manifest)
        empty = {name: EmptyForm(e.skip, e.tail, e.last) for name, e in found.empty.items()}
        return Manifest(_spec(found.model), _fields(found.fields), empty, _usable(found, record))
    except (ValueError, RecursionError, UsageError) as error:
        raise ModelError(f"{path}: its manifest is malformed: {first_line(error)}") from None


def write(path: str | os.PathLike[str], state: Mapping[str, Tensor], manifest: Any) -> Path:
    """Write weights and manifest as one file, whole or not at all.

    Args:
        path: the file; its folder must exist. `.pt` and `.pth` give torch's zip of plain tensors,
            which loads with weights_only=True; every other name gives safetensors.
        state: tensors by name; tensors that share memory are stored once each.
        manifest: anything JSON can hold.
    """
    path = Path(path)
    text = json.dumps({**manifest, "schema": SCHEMA}, sort_keys=True, allow_nan=False)
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    with atomic(path) as temporary:
        if path.suffix in (".pt", ".pth"):
            write_tensors({METADATA_KEY: text, "state_dict": tensors}, temporary)
        else:
            safetensors.torch.save_file(tensors, temporary, metadata={METADATA_KEY: text})
    return path


def _spec(model: _Model) -> ModelSpec:
    if model.source != "custom" and model.num_classes is msgspec.UNSET:
        raise ValueError("no number of classes - at `$.model.num_classes`")
    if model.kwargs.get("num_classes", model.num_classes) != model.num_classes:
        raise ValueError("not the number of classes in kwargs - at `$.model.num_classes`")
    if len(model.mean) != len(model.std):
        raise ValueError("mean and std differ in length - at `$.model.std`")
    if not all(map(math.isfinite, (*model.mean, *model.std))) or any(s <= 0 for s in model.std):
        raise ValueError("mean must be finite and std positive - at `$.model.std`")
    check_arguments(model.kwargs)
    return ModelSpec.from_plain(msgspec.to_builtins(model))


def check_arguments(value: Any, depth: int = 0) -> None:
    """Raise ValueError where a file's builder arguments are nested too deep or out of range."""
    if depth > DEEPEST_ARGUMENT:
        raise ValueError(f"builder arguments nested deeper than {DEEPEST_ARGUMENT}")
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        if len(value) > 2**12:
            raise ValueError(f"a builder argument of {len(value):,} entries")
        for entry in value:
            check_arguments(entry, depth + 1)
    elif isinstance(value, (int, float)) and not abs(value) <= LARGEST_ARGUMENT:
        raise ValueError(
            f"a builder argument of {str(value)[:40]}, the limit is {LARGEST_ARGUMENT:,}"
        )


def _fields(fields: Mapping[str, Mapping[str, Any]]) -> Fields:
    for layer, values in fields.items():
        for name, value in values.items():
            numbers = value if isinstance(value, list) else [value]
            if not all(math.isfinite(n) and abs(n) < LARGEST_NUMBER for n in numbers):
                raise ValueError(f"out of range - at `$.fields[{layer[:60]!r}][{name[:60]!r}]`")
    return {layer: dict(values) for layer, values in fields.items()}


def _usable(found: _Manifest, record: dict[str, Any]) -> dict[str, Any]:
    if found.threat is not None:
        ThreatModel(found.threat.norm, found.threat.eps)  # type: ignore[arg-type]
    return record
