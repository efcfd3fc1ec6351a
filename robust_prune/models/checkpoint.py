"""Read and write model files: safetensors and JSON; a file from a stranger never runs code."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from robust_prune.errors import ModelError, UnsafeFileError
from robust_prune.files import atomic, write_tensors
from robust_prune.user_code import importable_folder

SCHEMA = "robust-prune/model/1"
METADATA_KEY = "robust_prune"
STORED = ("model_args", "pretrained_cfg")  # in config.json, as timm writes it
AVERAGES = ("state_dict_ema", "model_ema")
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "state_dict.", "network.")
COUNTER = "n_averaged"  # of torch's AveragedModel, beside the prefixed weights
Kind = Literal["robust-prune", "timm", "huggingface", "state_dict", "module"]


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, before anything is built from it."""

    path: Path
    kind: Kind
    state: Mapping[str, Tensor]
    arch: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None
    notes: tuple[str, ...] = ()


def read(path: str | os.PathLike[str], *, trust_pickle: bool = False) -> Checkpoint:
    """Read a model file or a Hugging Face folder.

    Args:
        path: our own file, a `.safetensors`, `.pt` or `.pth` file, or a folder with config.json.
        trust_pickle: unpickle whole Python objects, which can run any code the file brings.

    Raises:
        UnsafeFileError: the file needs `trust_pickle`.
        ModelError: the file is missing, broken, or holds no weights.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    if path.is_dir():
        return _read_huggingface(path)
    if path.stat().st_size == 0:
        raise ModelError(f"{path}: the file is empty")
    if _looks_like_safetensors(path):
        return _read_safetensors(path)
    return _from_object(path, _load_torch(path, trust_pickle), trust_pickle)


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


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safetensors.safe_open(path, framework="pt") as reader:
            metadata = reader.metadata() or {}
        state = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file: {error}") from None
    if METADATA_KEY in metadata:
        return Checkpoint(path, "robust-prune", state, manifest=_manifest(path, metadata))
    return Checkpoint(path, "state_dict", strip_prefixes(state))


def _manifest(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        manifest = json.loads(metadata[METADATA_KEY])
        schema = manifest["schema"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: its manifest is malformed: {error}") from None
    if schema != SCHEMA:
        raise ModelError(f"{path}: schema {schema!r}; this version reads {SCHEMA!r}")
    return dict(manifest)


def _read_huggingface(folder: Path) -> Checkpoint:
    config_path = folder / "config.json"
    if not config_path.exists():
        raise ModelError(
            f"{folder}: a folder needs config.json and model.safetensors, as timm writes them"
        )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        arch = config["architecture"]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{config_path}: not JSON: {error}") from None
    except (KeyError, TypeError):
        raise ModelError(f"{config_path}: no 'architecture' in it; is it a timm model?") from None
    weights = folder / "model.safetensors"
    if not weights.exists():
        if not (folder / "pytorch_model.bin").exists():
            raise ModelError(f"{folder}: no model.safetensors beside config.json")
        weights = folder / "pytorch_model.bin"
        state = _from_object(weights, _load_torch(weights, trust_pickle=False), False).state
    else:
        state = _read_safetensors(weights).state
    kwargs, pretrained = ({**_mapping(config, name, config_path)} for name in STORED)
    classes = config.get("num_classes")
    if classes is not None:
        if not isinstance(classes, int):
            raise ModelError(f"{config_path}: 'num_classes' must be a number, not {classes!r}")
        kwargs.setdefault("num_classes", classes)
    return Checkpoint(folder, "huggingface", state, arch, kwargs, pretrained)


def _mapping(config: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    found = config.get(name) or {}
    if not isinstance(found, Mapping):
        raise ModelError(f"{path}: {name!r} must map names to values, not be {found!r}")
    return found


def _load_torch(path: Path, trust_pickle: bool) -> Any:
    try:
        # timm's training checkpoints carry their arguments as a Namespace, which only holds values
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None and not zipfile.is_zipfile(path) and not _looks_pickled(path):
            raise ModelError(f"{path}: not a PyTorch or safetensors file") from None
        if trust_pickle:
            return _unpickle(path)
        what = f" ({found.group(1)})" if found else ""
        raise UnsafeFileError(
            f"{path}: holds pickled Python objects{what}, and reading them can run any code the "
            "file brings; save model.state_dict() instead, or pass --trust-pickle if you trust "
            "its source"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        if not zipfile.is_zipfile(path) and not _looks_pickled(path):
            raise ModelError(f"{path}: not a PyTorch or safetensors file") from None
        raise ModelError(f"{path}: not readable by torch.load: {_first_line(error)}") from None


def _looks_like_safetensors(path: Path) -> bool:
    """Eight bytes of header length, then JSON; the suffix decides where that is not clear."""
    with path.open("rb") as stream:
        start = stream.read(9)
    return start[8:9] == b"{" or path.suffix == ".safetensors"


def _looks_pickled(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(1) == b"\x80"


def _unpickle(path: Path) -> Any:
    try:
        with importable_folder():
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # noqa: BLE001 - a pickle can raise anything
        raise ModelError(
            f"{path}: can't be unpickled: {type(error).__name__}: {_first_line(error)}; the code "
            "of its classes must be importable"
        ) from None


def _from_object(path: Path, loaded: Any, trusted: bool) -> Checkpoint:
    """Find the weights, or with `trusted` a whole module, in what torch.load returned."""
    if trusted:
        for candidate in (loaded, *(loaded.values() if isinstance(loaded, dict) else ())):
            if isinstance(candidate, nn.Module):
                return Checkpoint(path, "module", candidate.state_dict(), module=candidate)
    if not isinstance(loaded, Mapping):
        raise ModelError(f"{path}: holds a {type(loaded).__name__}, not a state_dict")
    state = _find_state(path, loaded)
    if isinstance(loaded.get(METADATA_KEY), str):
        return Checkpoint(path, "robust-prune", state, manifest=_manifest(path, loaded))
    arch, kwargs = _find_arch(loaded)
    kind: Kind = "timm" if arch else "state_dict"
    return Checkpoint(path, kind, strip_prefixes(state), arch, kwargs, notes=_averages_note(loaded))


def _find_state(path: Path, loaded: Mapping[str, Any]) -> dict[str, Tensor]:
    for key in (*AVERAGES, *WRAPPERS):
        if _holds_tensors(inner := loaded.get(key)):
            return _find_state(path, inner)
    state = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
    if not state:
        keys = ", ".join(repr(key) for key in list(loaded)[:5]) or "nothing"
        raise ModelError(f"{path}: no weights found; it holds {keys}")
    return state


def _holds_tensors(inner: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values())


def _averages_note(loaded: Mapping[str, Any]) -> tuple[str, ...]:
    average, other = (
        next((key for key in keys if _holds_tensors(loaded.get(key))), None)
        for keys in (AVERAGES, WRAPPERS)
    )
    if average is None or other is None:
        return ()
    return (
        f"the file holds two sets of weights; the moving average {average!r} is taken, as timm "
        f"does, and {other!r} is not",
    )


def _find_arch(loaded: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    arguments = loaded.get("args")
    arch = loaded.get("arch") or loaded.get("architecture") or getattr(arguments, "model", None)
    if not isinstance(arch, str):
        return None, {}
    kwargs = dict(loaded.get("model_kwargs") or getattr(arguments, "model_kwargs", None) or {})
    return arch, kwargs


def strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop prefixes such as `module.` that every key shares, but for a count of averaged models."""
    result = dict(state)
    for _ in range(4):
        names = [key for key in result if key != COUNTER]
        shared = next((p for p in PREFIXES if names and all(k.startswith(p) for k in names)), "")
        if not shared:
            break
        result = {key[len(shared) :]: result[key] for key in names}
    return result


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
