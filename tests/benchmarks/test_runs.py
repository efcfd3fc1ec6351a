"""Tests of the log that benchmarks of a few long runs write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.runs import log_of


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_runs_are_added_behind_their_own_settings(tmp_path: Path) -> None:
    for batch in (1, 64):
        with log_of(tmp_path / "record", batch=batch) as write:
            write({"ms": batch})
    lines = [json.loads(line) for line in (tmp_path / "record" / "runs.jsonl").open()]
    assert [line.get("batch") for line in lines] == [1, None, 64, None]
    assert [line.get("ms") for line in lines] == [None, 1, None, 64]
    assert {"threads", "versions", "device"} <= set(lines[0])


def test_a_line_is_on_disk_before_the_next_run_starts(tmp_path: Path) -> None:
    with log_of(tmp_path) as write:
        write({"ms": 1})
        last = (tmp_path / "runs.jsonl").read_text().splitlines()[-1]
    assert json.loads(last) == {"ms": 1}


def test_a_run_can_replace_the_last(tmp_path: Path) -> None:
    for ms in (1, 2):
        with log_of(tmp_path, mode="w", threads=2) as write:
            write({"ms": ms})
    assert torch.get_num_threads() == 2
    first, second = (json.loads(line) for line in (tmp_path / "runs.jsonl").open())
    assert (first["threads"], second) == (2, {"ms": 2})
