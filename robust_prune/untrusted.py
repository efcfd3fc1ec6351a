"""Text that others wrote: names of layers and data sets, notes, whatever a file's record holds.

A page escapes it, a picture and a terminal show it as plain text; what is left is text that lies
to the eye or gives orders to a terminal, and that is dealt with here.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robust_prune.errors import first_line

LARGEST_JSON = 2**26  # bytes; a plan of a large network has some hundred thousand

# they turn around the text after them as well, without being seen
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_ISOLATE, _END = "\u2068", "\u2069"


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        ValueError: it is larger than `LARGEST_JSON`, or not JSON; the message is one line.
        OSError: it can't be read.
    """
    with path.open("rb") as stream:
        text = stream.read(LARGEST_JSON + 1)  # of a device too, whose size nobody knows
    if len(text) > LARGEST_JSON:
        raise ValueError(f"larger than {LARGEST_JSON:,} bytes")
    return parse_json(text.removeprefix(codecs.BOM_UTF8))


def parse_json(text: str | bytes) -> Any:
    """Return what JSON text holds; raises ValueError with one line, also where it is too deep."""
    import msgspec  # as in `types`: its first import costs --help 10 ms

    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(first_line(error)) from None


def readable(value: Any) -> Any:
    """Return plain data with every string, keys too, safe to show among others.

    Control characters, lone surrogates and marks of direction are written out (`\\x1b`); text from
    right to left is isolated, so that it can't move its neighbours.
    """
    if isinstance(value, str):
        return _readable(value)
    if isinstance(value, Mapping):
        return {readable(key): readable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [readable(item) for item in value]
    return value


def _readable(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    shown = "".join(_written_out(c) if _is_hidden(c) else c for c in text)
    if any(unicodedata.bidirectional(c) in ("R", "AL") for c in shown):
        return f"{_ISOLATE}{shown}{_END}"
    return shown


def _is_hidden(character: str) -> bool:
    return character in _DIRECTIONS or (
        unicodedata.category(character) in ("Cc", "Cs") and character != "\n"
    )


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def shortened(text: str, most: int) -> str:
    """Return one line of at most `most` characters, the middle left out where there are more.

    Layers are told apart by both ends of their names.
    """
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    head = (most - 1) // 2
    cut = f"{line[:head]}…{line[len(line) - (most - 1 - head) :]}"
    return f"{_ISOLATE}{cut.strip(_ISOLATE + _END)}{_END}" if _ISOLATE in line else cut
