"""The state of a run in one file: tensors as safetensors, all else as JSON in the file's header.

Reading it runs nothing, whatever the file holds. The JSON mirrors the state; what JSON lacks stands
as an object with one key: `{"$tensor": [NAME, CHANNELS_LAST]}`, `{"$tuple": [...]}`, `{"$float":
"nan"}`, and `{"$pairs": [[key, value], ...]}` for keys that are not strings or look like one of
these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from robust_prune.errors import first_line
from robust_prune.files.writing import atomic

KEY = "robust_prune_state"
SCHEMA = "robust-prune/state/1"
DEEPEST = 64


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers, text, None and containers of these, whole or not at all.

    Raises:
        TypeError: something else is among them.
        ModelError: the file can't be written.
    """
    tensors: dict[str, Tensor] = {}
    held: set[int] = set()

    def keep(tensor: Tensor) -> dict[str, Any]:
        name, last = str(len(tensors)), _is_channels_last(tensor)
        stored = tensor.detach().cpu().contiguous()
        if stored.untyped_storage().data_ptr() in held:
            stored = stored.clone()  # the format holds no two views of the same memory
        held.add(stored.untyped_storage().data_ptr())
        tensors[name] = stored
        return {"$tensor": [name, last]}

    tree = {"schema": SCHEMA, "state": _plain(dict(state), keep)}
    text = json.dumps(tree, allow_nan=False)
    with atomic(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={KEY: text})


def read_state(path: Path) -> dict[str, Any]:
    """Return what `write_state` was given, tensors on the CPU.

    Raises:
        ValueError: the file is not a state of this version; the message says why, in one line.
        OSError: the file can't be read.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            text = (opened.metadata() or {}).get(KEY)
            if text is None:
                raise ValueError("it holds no state of a run")
            tree = json.loads(text)
            if not isinstance(tree, dict) or tree.get("schema") != SCHEMA:
                raise ValueError(f"this version reads {SCHEMA}")
            state = _restored(tree["state"], opened.get_tensor)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except (safetensors.SafetensorError, LookupError, TypeError, RuntimeError) as error:
        raise ValueError(first_line(error)) from None
    if not isinstance(state, dict):
        raise ValueError("its state is not an object")
    return state


def _plain(value: Any, keep: Callable[[Tensor], Any], depth: int = 0) -> Any:
    if depth > DEEPEST:
        raise TypeError(f"a state nested deeper than {DEEPEST}")

    def inside(item: Any) -> Any:
        return _plain(item, keep, depth + 1)

    if isinstance(value, Tensor):
        return keep(value)
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: inside(item) for key, item in value.items()}
        return {"$pairs": [[inside(key), inside(item)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [inside(item) for item in value]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a state holds plain data and tensors, not {type(value).__name__}")


def _restored(value: Any, tensor: Callable[[str], Tensor], depth: int = 0) -> Any:
    if depth > 2 * DEEPEST:  # a pair counts twice
        raise ValueError("nested too deep")

    def inside(item: Any) -> Any:
        return _restored(item, tensor, depth + 1)

    if isinstance(value, list):
        return [inside(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not (kind := next(iter(value))).startswith("$"):
        return {key: inside(item) for key, item in value.items()}
    held = value[kind]
    if kind == "$tensor":
        last = torch.channels_last if held[1] else torch.contiguous_format
        return tensor(held[0]).clone(memory_format=last)  # else a view of the open file
    if kind == "$tuple":
        return tuple(inside(held))
    if kind == "$pairs":
        return {inside(key): inside(item) for key, item in held}
    if kind == "$float":
        return float(held)
    raise ValueError(f"it holds a value of an unknown kind {kind[:40]!r}")


def _is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )
