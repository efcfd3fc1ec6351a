"""Bytes of a valid file, changed: flipped, cut, repeated, numbers and JSON values swapped."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 2**31, 2**53, 2**63, 2**64, 10**30),
    *("", "x", "0", "nan", "inf", "\x00", "\ud800", "a" * 600, "\u202e", "../x", "/etc/passwd"),
    *([], {}, [[]], [None], [1, 2], {"": 0}, {"x": {"x": []}}, [[0, 1], [2, 3]], {"$tensor": []}),
    *({"$tuple": 1}, {"$pairs": [[[], 0]]}, {"$pairs": [1]}, {"$float": []}, {"$tensor": ["0"]}),
)
Change = Callable[[bytes, random.Random], bytes]


def _flip(data: bytes, generator: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 4, 16))):
        if found:
            found[generator.randrange(len(found))] = generator.choice(
                (0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256))
            )
    return bytes(found)


def _cut(data: bytes, generator: random.Random) -> bytes:
    start, end = sorted(generator.randrange(len(data) + 1) for _ in range(2))
    return generator.choice((data[:start], data[end:], data[:start] + data[end:]))


def _repeat(data: bytes, generator: random.Random) -> bytes:
    start, end = sorted(generator.randrange(len(data) + 1) for _ in range(2))
    piece = data[start:end][:200] * generator.choice((2, 3, 50))
    place = generator.randrange(len(data) + 1)
    return data[:place] + piece + data[place:]


def _number(data: bytes, generator: random.Random) -> bytes:
    places = list(re.finditer(rb"\d+", data))
    if not places:
        return _flip(data, generator)
    place = generator.choice(places)
    number = generator.choice((b"0", b"-1", b"1e400", b"1.5", b"9" * 25, b"4294967296", b"NaN"))
    return data[: place.start()] + number + data[place.end() :]


def _value(data: bytes, generator: random.Random) -> bytes:
    """Another value at a random place of JSON, or a key renamed, or one entry taken twice."""
    try:
        tree = json.loads(data)
        places = list(_places(tree)) if isinstance(tree, (dict, list)) else []
    except (ValueError, RecursionError):  # no JSON, or too deep
        places = []
    if not places:
        return _flip(data, generator)
    for _ in range(generator.choice((1, 1, 2))):
        holder, key = generator.choice(places)
        if isinstance(holder, dict) and generator.random() < 0.2:
            holder[generator.choice(("", "x", "schema", "\u202e"))] = holder.pop(key, None)
        elif generator.random() < 0.2:
            other, place = generator.choice(places)
            if isinstance(other, list) and place >= len(other):
                continue
            holder[key] = json.loads(
                json.dumps(other.get(place) if isinstance(other, dict) else other[place])
            )
        else:
            holder[key] = generator.choice(VALUES)
    return json.dumps(tree).encode("utf-8", errors="surrogatepass")


def _places(tree: Any) -> Any:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


CHANGES: tuple[Change, ...] = (_flip, _flip, _cut, _repeat, _number, _value, _value, _value)


def changed(data: bytes, generator: random.Random) -> bytes:
    """Return the file with one to three changes."""
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        data = generator.choice(CHANGES)(data, generator)
    return data
