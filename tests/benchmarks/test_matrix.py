"""The matrix: which cells there are, what is missing of them, and how they are compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.matrix import cells, summary
from benchmarks.matrix.cells import Cell
from benchmarks.matrix.drawing import draw
from benchmarks.matrix.levels import CAPACITY, DENSE, LEVELS, LONG, OURS, SMOKE, UNTUNED, Key
from benchmarks.matrix.work import Bench

BLOCK = ("digits", "resnet10-narrow", "pgd-at", 0.75)
PEER = "tp-l2-local"


def cell(arm: str, verdicts: str, seed: int = 0, tuning: str = LONG, ratio: float = 0.75) -> Cell:
    key = Key("digits", "resnet10-narrow", "pgd-at", ratio, arm, tuning, seed)
    return Cell(key, "linf 0.1", 10, 5, (2, 3), 1.5, clean=verdicts, pgd=verdicts)


@pytest.mark.parametrize("name", LEVELS)
def test_every_cell_has_a_name_of_its_own(name: str) -> None:
    level = LEVELS[name]
    best = {
        (d.name, n.name, m, r): level.screened[:1]
        for d in level.data
        for n in level.networks
        for m in level.methods
        for r in level.ratios
    }
    keys = list(dict.fromkeys((*level.screens(), *level.cells(best))))
    assert len({key.label for key in keys}) == len(keys)
    assert {key.ratio for key in keys if key.arm == DENSE} == {0.0}
    assert {key.arm for key in keys} == {DENSE, *level.arms, *level.screened}


def test_cells_are_kept_and_what_is_missing_is_known(tmp_path: Path) -> None:
    keys = list(SMOKE.cells({BLOCK: (PEER,)}))
    cells.write(tmp_path, cell(OURS, "0110"))
    assert cells.read(tmp_path) == [cell(OURS, "0110")]
    left = cells.missing(tmp_path, keys)
    assert len(left) == len(set(keys)) - 1
    assert cell(OURS, "").key not in left


def test_the_best_arms_before_fine_tuning_go_on() -> None:
    found = cells.finalists(
        [
            cell("tp-a", "1000", tuning=UNTUNED),
            cell("tp-b", "1110", tuning=UNTUNED),
            cell("tp-c", "1100", tuning=UNTUNED),
            cell("tp-a", "1111"),  # tuned: does not count
            cell(OURS, "1111", tuning=UNTUNED),
        ],
        2,
    )
    assert found == {BLOCK: ("tp-b", "tp-c")}


@pytest.mark.parametrize("name", LEVELS)
def test_a_level_cut_down_has_the_same_cells_and_little_to_do(name: str) -> None:
    level, cut = LEVELS[name], LEVELS[name].cut(16)
    assert list(cut.cells({})) == list(level.cells({}))
    assert {n.training["epochs"] * cut.data[0].passes for n in cut.networks} == {1}
    assert max(t.epochs for t in cut.tunings) == 1
    assert max(t.autoattack for t in cut.tunings) == 1
    assert cut.test_images == cut.train_images == cut.calibration_images == 16
    splits = Bench(SMOKE.cut(16), None, Path(), "cpu", print).splits(SMOKE.data[0])
    assert len(splits.train) == 16
    assert splits.validation is not None
    assert len(splits.validation) == 16


def test_holm_by_hand() -> None:
    assert summary.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert summary.holm([0.9, 0.8]) == [1.0, 1.0]
    assert summary.holm([]) == []


def test_ours_meets_the_best_peer_on_the_same_images() -> None:
    found = summary.comparisons(
        [
            cell(OURS, "1" * 60 + "0" * 40),
            cell(PEER, "0" * 20 + "1" * 30 + "0" * 50),
            cell("tp-fpgm", "1" * 10 + "0" * 90),
            cell(DENSE, "1" * 100, ratio=0.0),
        ],
        OURS,
    )
    assert [(c.theirs, c.attack, c.seeds, c.images) for c in found] == [(PEER, "pgd", 1, 100)]
    assert found[0].gain == pytest.approx(30)
    assert found[0].p == pytest.approx(2 * 0.5**30)  # 30 against none, exact McNemar
    text = summary.tables([cell(OURS, "1" * 60 + "0" * 40), cell(PEER, "0" * 100)])
    assert "**+60.0**" in text
    assert "resnet10-narrow, pgd-at, 75 % removed, long (linf 0.1)" in text


def test_autoattack_is_what_counts_where_it_has_judged_some_seeds() -> None:
    def judged(arm: str, seed: int, autoattack: str) -> Cell:
        found = cell(arm, "1" * 90 + "0" * 10 if arm == OURS else "1" * 50 + "0" * 50)
        return replace(found, key=replace(found.key, seed=seed), autoattack=autoattack)

    cells = [judged(OURS, 0, "1010"), judged(OURS, 1, ""), judged(PEER, 0, "0010")]
    found = summary.comparisons([*cells, judged(PEER, 1, ""), judged("tp-worse", 0, "")], OURS)
    assert [(c.theirs, c.attack, c.seeds, c.images) for c in found] == [(PEER, "autoattack", 1, 4)]
    assert found[0].gain == pytest.approx(25)


def test_an_arm_that_fails_is_named() -> None:
    key = cell(PEER, "").key
    text = summary.tables([cell(OURS, "10"), Cell(key, error="no such channels")])
    assert f"{key.label}: no such channels" in text


def test_autoattack_takes_what_a_claim_would_rest_on() -> None:
    won = [cell(CAPACITY, "1" * 60 + "0" * 40), cell(OURS, "1" * 50 + "0" * 50)]
    arms = [
        *won,
        cell(PEER, "1" * 30 + "0" * 70),
        cell("tp-worse", "0" * 100),
        cell(DENSE, "1" * 100, ratio=0.0),
    ]
    assert [c.key.arm for c in summary.claims(arms, 0.05)] == [CAPACITY, PEER, DENSE]
    halves = [replace(c, key=replace(c.key, ratio=0.5)) for c in arms[:-1]]
    assert [c.key.arm for c in summary.claims([*arms, *halves], 0.05)].count(DENSE) == 1
    even = [cell(OURS, "10" * 50), cell(PEER, "10" * 50)]
    assert summary.claims(even, 0.05) == []
    assert [c.key.arm for c in summary.claims(even, 1.0)] == [OURS, PEER]


def test_the_figure_has_a_panel_for_each_block(tmp_path: Path) -> None:
    draw([cell(DENSE, "10", ratio=0.0)], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    judged = replace(cell(OURS, "1100" * 25), autoattack="1000" * 25)
    arms = [judged, cell(PEER, "0100" * 25), cell(DENSE, "1110" * 25, ratio=0.0)]
    halves = [replace(c, key=replace(c.key, ratio=0.5)) for c in arms[:2]]
    sizes = []
    for found in (arms, [*arms, *halves]):
        draw(found, tmp_path / "some.png")
        sizes.append(Image.open(tmp_path / "some.png").size)
    assert sizes[1][0] == 2 * sizes[0][0]
