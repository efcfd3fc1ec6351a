"""The list of all records: what each says, and the command that makes it again."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

RECORDS = Path(__file__).parent / "records"
HEAD = """# Benchmarks

<!-- written by `python -m benchmarks --index` from the READMEs of the records -->

`make bench` runs criteria, matrix, zoo and speed in small, in minutes. `make bench LEVEL=cpu
DATA=DIR` takes hours on image folders (`DIR/cifar10`, `DIR/cifar100`, `DIR/tiny-imagenet-20`),
`make bench LEVEL=gpu DATA=DIR` is the same at the papers' sizes; `ONLY=matrix` runs one suite,
`JOBS=2` two cells at once. Both go on where they stopped. Whether a level runs on a machine is
tried with `python -m benchmarks.matrix --level gpu --data DIR --cut 16 --only cifar10 resnet18 0.75
seed=0`. What did not work is in [LOG.md](LOG.md).
"""


def index(records: Path) -> str:
    """Return the page: one section a record, the newest first.

    Raises:
        ValueError: a record names no command.
    """
    folders = sorted((p for p in records.iterdir() if p.is_dir()), reverse=True)
    return "\n".join((HEAD, *(section(folder) for folder in folders)))


def section(folder: Path) -> str:
    """Return what a record's README says of it: its title, its commands, its findings."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    title = text.splitlines()[0].removeprefix("# ")
    found = [relinked(line, folder.name) for line in findings(text)]
    lines = [f"## [{folder.name}](records/{folder.name}/README.md): {title}", ""]
    lines += [f"    {command}" for command in commands(folder.name, text)]
    return "\n".join((*lines, "", *(f"- {line}" for line in found), *([""] if found else [])))


def commands(name: str, text: str) -> list[str]:
    """Return the commands that a README gives, each on one line."""
    flat = re.sub(r"\\?\n\s*", " ", text)
    inline = re.findall(r"`((?:python -m benchmarks|make bench)[^`]*)`", flat)
    blocks = re.findall(r"^(?:    )?(python -m benchmarks.*)$", text, re.MULTILINE)
    found = list(dict.fromkeys((*blocks, *(" ".join(c.split()) for c in inline))))
    if not found:
        raise ValueError(f"the README of record {name} gives no command")
    return found


def relinked(line: str, name: str) -> str:
    """Return a line whose links lead from the folder of the index, not from the record's."""

    def led(match: re.Match[str]) -> str:
        target = posixpath.normpath(f"records/{name}/{match[1]}")
        return f"]({target})"

    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", led, line)


def findings(text: str, most: int = 5) -> list[str]:
    """Return the items of the findings, or of the first lists, without those about files."""
    text = text[max(text.find("\n## Findings"), 0) :]
    text = text.partition("\n## Not covered")[0]
    items = re.findall(r"^- (.+(?:\n  .+)*)", text, re.MULTILINE)
    flat = (" ".join(item.split()) for item in items)
    return [item for item in flat if not item.startswith("`")][:most]
