"""The option reference of the docs, made from the groups."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from robust_prune.options.stating import Options, choices, hints, stated


def reference(*groups: type[Options]) -> str:
    """Return the options of some groups as a Markdown table.

    One row each: the name in Python, the flag of the command line (where it has one), the default,
    what it may be, and its help.
    """
    lines = ["| Python | command line | default | values | |", "|---|---|---|---|---|"]
    for group in groups:
        defaults = {f.name: f.default for f in dataclasses.fields(group)}
        types = hints(group)
        for name, what in stated(group).items():
            flag = what.flag or f"--{name.replace('_', '-')}"
            cells = (
                f"`{name}`",
                f"`{flag}`" if what.shown else "",
                "" if defaults[name] is None else f"`{defaults[name]}`",
                _values(types[name], str(what.within or "")),
                what.help,
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _values(hint: Any, limits: str) -> str:
    if words := choices(hint):
        return ", ".join(f"`{word}`" for word in words)
    kinds = {int: "whole number", float: "number", bool: "yes or no", str: "text", Path: "path"}
    named = [kinds[kind] for kind in (hint, *typing.get_args(hint)) if kind in kinds]
    return ", ".join(part for part in (*named[:1], limits) if part)
