"""Cells on disk, one file each, so that processes need not wait for one another."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.criteria.protocol import percent
from benchmarks.matrix.levels import UNTUNED, Contest, Key
from robust_prune.files import write_text


@dataclass(frozen=True)
class Cell:
    """One model measured. Verdicts are strings of 0 and 1, one per test image, the same for all."""

    key: Key
    threat: str = ""
    macs: int = 0
    params: int = 0
    widths: tuple[int, ...] = ()
    log_capacity: float = 0.0
    clean: str = ""
    pgd: str = ""
    autoattack: str = ""
    validation: float = 0.0
    best_epoch: int = 0
    cpu_seconds: float = 0.0
    dense: str = ""  # fingerprint of the model that was pruned
    notes: tuple[str, ...] = ()
    error: str = ""


def path_of(record: Path, key: Key) -> Path:
    """Return where a cell is kept."""
    return record / "cells" / f"{key.label}.json"


def write(record: Path, cell: Cell) -> None:
    """Keep a cell, whole or not at all."""
    path = path_of(record, cell.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(cell)) + "\n")


def read(record: Path) -> list[Cell]:
    """Return what a record holds so far, by name."""
    return [_cell(json.loads(p.read_text())) for p in sorted((record / "cells").glob("*.json"))]


def read_one(record: Path, key: Key) -> Cell:
    """Return a cell that a record holds."""
    return _cell(json.loads(path_of(record, key).read_text()))


def missing(record: Path, keys: Iterable[Key]) -> list[Key]:
    """Return the cells that a record does not hold yet, each once."""
    return [key for key in dict.fromkeys(keys) if not path_of(record, key).exists()]


def finalists(cells: Sequence[Cell], most: int) -> dict[Contest, tuple[str, ...]]:
    """Return torch-pruning's best arms by block, by robust accuracy before fine-tuning."""
    found: dict[Contest, dict[str, list[float]]] = {}
    for cell in cells:
        key = cell.key
        if key.arm.startswith("tp-") and key.tuning == UNTUNED and not cell.error:
            block = found.setdefault((key.data, key.network, key.method, key.ratio), {})
            block.setdefault(key.arm, []).append(percent(cell.pgd))
    return {
        block: tuple(sorted(arms, key=lambda arm: -statistics.mean(arms[arm]))[:most])
        for block, arms in found.items()
    }


def _cell(plain: dict[str, Any]) -> Cell:
    lists = {name: tuple(plain[name]) for name in ("widths", "notes")}
    return Cell(**{**plain, **lists, "key": Key(**plain["key"])})
