"""What the record of deciding without data says, and that product and pages say the same."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.without_data.cells import Cell, Pair, pairs, points, read, short_table
from robust_prune.pipeline.grade import POINTS_AT_HALF, POINTS_BEYOND

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "records" / "2026-11-26_without-data"


def cell(arm: str, pgd: str, ratio: float = 0.5, seed: int = 0) -> Cell:
    return Cell("net", arm, ratio, seed, pgd, pgd, 1.0)


def test_points_lost_are_those_of_the_images_on_which_arms_disagree() -> None:
    pair = Pair(
        cell("stand-ins", "1" * 50 + "0" * 50), cell("data", "1" * 40 + "0" * 40 + "1" * 20)
    )
    assert (pair.test.first_only, pair.test.second_only) == (20, 10)
    assert pair.lost == pytest.approx(10)
    assert pair.at_most == pytest.approx(10 + 196 * math.sqrt((0.3 - 0.01) / 100))


def test_arms_are_compared_at_the_same_share_and_seed() -> None:
    cells = [cell("data", "11"), cell("stand-ins", "10"), cell("stand-ins", "00", seed=1)]
    assert [p.lost for p in pairs(cells, "stand-ins")] == [50]
    assert points(cells, beyond_half=True) == 0


def test_the_grade_is_what_the_record_says() -> None:
    cells = list(read(RECORD / "cells.jsonl"))
    assert points(cells, beyond_half=False) == POINTS_AT_HALF
    assert points(cells, beyond_half=True) == POINTS_BEYOND


def test_pages_show_the_record() -> None:
    cells = list(read(RECORD / "cells.jsonl"))
    assert short_table(cells) in (ROOT / "docs" / "evaluation.md").read_text()
    assert short_table(cells) in (RECORD / "summary.md").read_text()


def test_seconds_on_the_page_are_those_of_the_record() -> None:
    networks = json.loads((RECORD / "seconds.json").read_text())["networks"]
    page = (ROOT / "docs" / "evaluation.md").read_text()
    for arch, cost in networks.items():
        assert f"| {arch} | {cost['cpu_seconds']:.0f} |" in page
