"""What a file holds once it is plain data: tensors by their full names, settings beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_prune.errors import ModelError
from robust_prune.models.values import plain

DEEPEST, MOST_VALUES = 40, 5_000_000
MOST_COPIES = 8  # names of one tensor, on average over a file
# a tensor may be larger than its file by this many bytes: one entry that stands for many
FREE_BYTES = 2**20


@dataclass(frozen=True)
class Content:
    """Tensors, settings and modules of a file, in its order.

    `tensors` are named by every key on the way to them, joined by dots; `holders` gives the length
    of that way without the key of the last mapping. `settings` are the mappings on the way, by the
    same names, with what they hold besides tensors.
    """

    path: Path
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    holders: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    keys: tuple[str, ...] = ()

    @property
    def values(self) -> int:
        """How many numbers the tensors hold together."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def content_of(path: Path, loaded: Any, size: int) -> Content:
    """Collect what a file of `size` bytes holds, whatever it is nested in.

    The state of optimizers is left out: its tensors belong to weights, but are none.

    Raises:
        ModelError: a tensor claims more entries than the file can hold.
    """
    content = Content(path, {}, {}, {}, {}, _keys(loaded))
    claimed = 0
    for name, holder, value in _walk(path, loaded):
        if isinstance(value, nn.Module):
            content.modules[name] = value  # type: ignore[index]
        elif isinstance(value, Mapping):
            content.settings[name] = {  # type: ignore[index]
                key: entry for key, entry in value.items() if isinstance(key, str)
            }
        elif isinstance(value, Tensor) and _dense(value) and name not in content.tensors:
            claimed += _check_size(path, name, value, size)
            if claimed > MOST_COPIES * size + FREE_BYTES:
                raise ModelError(f"{path}: its tensors claim {claimed:,} bytes of {size:,}")
            content.tensors[name] = value.detach()  # type: ignore[index]
            content.holders[name] = holder  # type: ignore[index]
    return content


def _walk(path: Path, loaded: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield (name, name of the mapping around it, value); every container once."""
    seen: set[int] = set()
    ahead: list[tuple[str, str, Any, int]] = [("", "", loaded, 0)]
    count = 0
    while ahead:
        name, holder, value, depth = ahead.pop()
        value = plain(value)
        count += 1
        if count > MOST_VALUES:
            raise ModelError(f"{path}: holds more than {MOST_VALUES:,} values; is it a model?")
        if isinstance(value, (Mapping, list, tuple)):
            if id(value) in seen or depth > DEEPEST:
                continue
            seen.add(id(value))
        yield name, holder, value
        inner: list[tuple[Any, Any]] = []
        if isinstance(value, Mapping) and not _is_optimizer(value):
            inner = list(value.items())
        elif isinstance(value, (list, tuple)):
            inner = list(enumerate(value))
        ahead += [
            (f"{name}.{key}" if name else str(key), name, entry, depth + 1)
            for key, entry in reversed(inner)
            if isinstance(key, (str, int))
        ]


def _is_optimizer(value: Mapping[Any, Any]) -> bool:
    return "param_groups" in value and "state" in value


def _dense(tensor: Tensor) -> bool:
    strided = tensor.layout is torch.strided and not tensor.is_quantized
    return strided and tensor.device.type == "cpu"


def _check_size(path: Path, name: str, tensor: Tensor, size: int) -> int:
    claimed = tensor.numel() * tensor.element_size()
    if claimed > size + FREE_BYTES:
        raise ModelError(
            f"{path}: {name[:100]!r} claims {claimed:,} bytes, the whole file has {size:,}"
        )
    return claimed


def _keys(loaded: Any) -> tuple[str, ...]:
    return tuple(str(key)[:40] for key in list(loaded)[:5]) if isinstance(loaded, Mapping) else ()


def numbers_of(value: Any) -> tuple[float, ...] | None:
    """Return numbers that a setting lists, as a list, an array, or a text with commas."""
    value = plain(value)
    if isinstance(value, Tensor):
        # the shortest decimals that stand for these float32 numbers
        few = value.detach().flatten()[:64].float().numpy() if value.numel() <= 64 else ()
        value = [str(number) for number in few]
    if isinstance(value, str) and len(value) < 1000:
        value = value.strip("()[] ").replace(",", " ").split()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or len(value) > 64:
        return None
    try:
        return tuple(float(number) for number in value)
    except (TypeError, ValueError, OverflowError):
        return None
