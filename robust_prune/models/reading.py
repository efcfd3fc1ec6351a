"""From a file's bytes to plain data; a file from a stranger never runs code."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import reprlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from robust_prune.errors import ModelError, UnsafeFileError, first_line
from robust_prune.files import is_there
from robust_prune.models.content import Content, content_of
from robust_prune.models.manifest import METADATA_KEY, Manifest, parse_manifest
from robust_prune.models.recognising import (
    check_archive,
    foreign,
    is_archive,
    looks_like_safetensors,
    looks_pickled,
    text_of,
)
from robust_prune.models.values import STAND_INS
from robust_prune.types import to_plain
from robust_prune.untrusted import read_json
from robust_prune.user_code import importable_folder

STORED = ("model_args", "pretrained_cfg")  # in config.json, as timm writes it
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.safetensors", "model.bin")
LIBRARY = "robust-prune"  # what `library_name` says in config.json of ours
WEIGHT_SUFFIXES = (".pt", ".pth", ".ckpt", ".tar", ".safetensors", ".bin")
INDEX = ".index.json"  # beside weights in several files: which tensor is in which
MESSAGE_LENGTH = 2000


@dataclass(frozen=True)
class ModelFile:
    """What a file holds, before anything is built from it.

    `manifest` is there in files of our own, `arch`, `kwargs` and `pretrained_cfg` in folders as
    timm writes them.
    """

    path: Path
    content: Content
    manifest: Manifest | None = None
    arch: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)


def read(path: str | os.PathLike[str], *, trust_pickle: bool = False) -> ModelFile:
    """Read a model file or a folder with weights in it.

    Args:
        path: our own file, a `.safetensors`, `.pt` or `.pth` file, or a folder with weights and,
            as timm writes it, config.json.
        trust_pickle: unpickle whole Python objects, which can run any code the file brings.

    Raises:
        UnsafeFileError: the file needs `trust_pickle`.
        ModelError: the file is missing, broken, or holds no weights.
    """
    path = Path(path)
    if not is_there(path):
        raise ModelError(f"{path}: no such file or folder")
    if path.is_dir():
        return _read_folder(path, trust_pickle)
    if path.stat().st_size == 0:
        raise ModelError(f"{path}: the file is empty")
    found = _read_file(path, trust_pickle)
    if not found.content.tensors and not found.content.modules:
        keys = ", ".join(repr(key) for key in found.content.keys) or "nothing"
        raise ModelError(f"{path}: no weights found; it holds {keys}")
    return found


def _read_file(path: Path, trust_pickle: bool) -> ModelFile:
    if looks_like_safetensors(path):
        return _read_safetensors(path)
    loaded = _load_torch(path, trust_pickle)
    if not isinstance(loaded, (Mapping, list, tuple)) and not trust_pickle:
        raise ModelError(f"{path}: holds a {type(loaded).__name__}, not a state_dict")
    if isinstance(loaded, Mapping) and isinstance(loaded.get(METADATA_KEY), str):
        manifest = parse_manifest(path, loaded[METADATA_KEY])
        inner = loaded.get("state_dict")
        return ModelFile(path, content_of(path, inner, path.stat().st_size), manifest)
    return ModelFile(path, content_of(path, loaded, path.stat().st_size))


def _read_safetensors(path: Path) -> ModelFile:
    try:
        with safetensors.safe_open(path, framework="pt") as reader:
            metadata = reader.metadata() or {}
        state: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        if text := text_of(path):
            raise ModelError(f"{path}: not a safetensors file{text}") from None
        line = first_line(error)
        if "not fully covered" in line:
            line += "; is it cut short: was all of it copied?"
        raise ModelError(f"{path}: not a readable safetensors file: {line}") from None
    content = content_of(path, state, path.stat().st_size)
    if METADATA_KEY in metadata:
        return ModelFile(path, content, parse_manifest(path, metadata[METADATA_KEY]))
    return ModelFile(path, content)


def _read_folder(folder: Path, trust_pickle: bool) -> ModelFile:
    """Read weights in one file or several, and config.json where it names an architecture."""
    config_path = folder / "config.json"
    config = _read_json(config_path) if config_path.exists() else {}
    weights = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if config.get("library_name") == LIBRARY:
        return _read_own_folder(folder, config)
    if weights is not None:
        content = _read_file(weights, trust_pickle).content
    else:
        content = _read_shards(folder, trust_pickle)
    if not content.tensors:
        raise ModelError(f"{folder}: no weights found in it")
    content = replace(content, settings={**content.settings, **_settings_beside(folder, config)})
    arch = config.get("architecture")
    if arch is not None and not isinstance(arch, str):
        raise ModelError(f"{config_path}: 'architecture' must be a name, not {_short(arch)}")
    if config and arch is None and config_path.exists() and "model_type" not in config:
        raise ModelError(f"{config_path}: no 'architecture' in it; is it a timm model?")
    kwargs, pretrained = ({**_mapping(config, name, config_path)} for name in STORED)
    classes = config.get("num_classes")
    if classes is not None:
        if type(classes) is not int or not 0 <= classes < 2**31:
            raise ModelError(
                f"{config_path}: 'num_classes' must be a number, not {_short(classes)}"
            )
        kwargs.setdefault("num_classes", classes)
    return ModelFile(folder, content, None, arch, kwargs, pretrained)


def _settings_beside(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Return what configurations beside weights say, but for what timm's own is read for."""
    found: dict[str, Any] = {"config.json": {k: v for k, v in config.items() if k not in STORED}}
    for path in sorted(folder.glob("*_config.json")):
        found[path.name] = _read_json(path)
    return {name: value for name, value in content_of(folder, found, 0).settings.items() if name}


def _read_own_folder(folder: Path, config: Mapping[str, Any]) -> ModelFile:
    """Read what `save_pretrained` wrote; the manifest in the weights counts."""
    weights = folder / WEIGHTS[0]
    if not weights.is_file():
        raise ModelError(f"{folder}: no {WEIGHTS[0]} in it")
    found = _read_file(weights, trust_pickle=False)
    if found.manifest is None:
        raise ModelError(
            f"{folder}: its config.json is of {LIBRARY}, and its {WEIGHTS[0]} has no manifest"
        )
    spec = json.loads(json.dumps(to_plain(found.manifest.spec)))
    if config.get("model") != spec:
        raise ModelError(f"{folder}: config.json and {WEIGHTS[0]} are of different networks")
    return replace(found, path=folder)


def _read_shards(folder: Path, trust_pickle: bool) -> Content:
    """Read weights that lie in several files, as accelerate and the Hub's libraries write them."""
    index = next((path for name in WEIGHTS if (path := folder / f"{name}{INDEX}").exists()), None)
    if index is None:
        near = (*folder.glob("*"), *folder.glob("*/*"))
        weights = [p.name for p in near if p.suffix in WEIGHT_SUFFIXES and p.is_file()]
        hint = f"; it holds {min(weights)}: name the file itself" if weights else ""
        raise ModelError(
            f"{folder}: a folder needs model.safetensors, and config.json as timm writes it{hint}"
        )
    places = _mapping(_read_json(index), "weight_map", index)
    tensors: dict[str, Tensor] = {}
    files = {path.name for path in folder.iterdir() if path.is_file()}
    for name in sorted({name for name in places.values() if isinstance(name, str)}):
        if Path(name).name != name or name not in files:
            raise ModelError(f"{index}: {_short(name)} is no file beside it")
        tensors.update(_read_file(folder / name, trust_pickle).content.tensors)
    return Content(folder, tensors, dict.fromkeys(tensors, ""))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: not JSON: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: must hold a JSON object, not {_short(found)}")
    return found


def _mapping(config: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    found = config.get(name) or {}
    if not isinstance(found, Mapping):
        raise ModelError(f"{path}: {name!r} must map names to values, not be {_short(found)}")
    return found


def _load_torch(path: Path, trust_pickle: bool) -> Any:
    check_archive(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(STAND_INS)):
            warnings.simplefilter("ignore")  # advice to callers of torch.load
            with _short_searches():
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None and not is_archive(path) and not looks_pickled(path):
            raise ModelError(foreign(path)) from None
        if trust_pickle:
            return _unpickle(path)
        if "Unsupported operand" in str(error):
            raise UnsafeFileError(
                f"{path}: written with another pickle protocol than torch.save's own, which is "
                "read without trust in nothing but plain data; write it again by "
                "torch.save(state_dict, path), or pass --trust-pickle if you trust its source"
            ) from None
        what = f" ({found.group(1)})" if found else ""
        raise UnsafeFileError(
            f"{path}: holds pickled Python objects{what}, and reading them can run any code the "
            "file brings; save model.state_dict() instead, or pass --trust-pickle if you trust "
            "its source"
        ) from None
    except Exception as error:  # noqa: BLE001 - a broken pickle can raise anything
        if not is_archive(path) and not looks_pickled(path):
            raise ModelError(foreign(path)) from None
        raise ModelError(f"{path}: not readable by torch.load: {first_line(error)}") from None


class _ShortSearches:
    """`re`, searching no more than the beginning of a text."""

    def __getattr__(self, name: str) -> Any:
        return getattr(re, name)

    def search(self, pattern: str, text: str) -> re.Match[str] | None:
        return re.search(pattern, text[:MESSAGE_LENGTH])


@contextlib.contextmanager
def _short_searches() -> Iterator[None]:
    """Keep torch.load from searching its message in time that is quadratic in names of the file.

    A name of 8,000 letters took it 20 seconds.
    """
    own = getattr(torch.serialization, "re", None)
    if own is not re:  # of another version of torch, or in another thread
        yield
        return
    torch.serialization.re = _ShortSearches()  # type: ignore[assignment, attr-defined]
    try:
        yield
    finally:
        torch.serialization.re = re  # type: ignore[attr-defined]


def _unpickle(path: Path) -> Any:
    try:
        with importable_folder():
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # noqa: BLE001 - a pickle can raise anything
        raise ModelError(
            f"{path}: can't be unpickled: {type(error).__name__}: {first_line(error)}; the code "
            "of its classes must be importable"
        ) from None


def _short(value: Any) -> str:
    return reprlib.repr(value)
