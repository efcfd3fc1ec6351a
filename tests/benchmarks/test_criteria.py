"""The benchmark of criteria: equal costs, paired tests by hand, and runs that are taken up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.criteria import peers, protocol, summary
from benchmarks.criteria.levels import LEVELS
from benchmarks.criteria.protocol import Bench, Cell, Stage
from robust_prune.adversaries import adversarial_set
from robust_prune.data import open_data
from robust_prune.graph import count_cost
from robust_prune.types import ThreatModel
from tests.conftest import tiny_resnet

SIZE = (3, 32, 32)


def cell(arm: str, seed: int, pgd: str, ratio: float = 0.5, stage: str = "untuned") -> Cell:
    return Cell("net", stage, arm, ratio, seed, 10, 5, clean="1" * len(pgd), pgd=pgd)


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda p: p.name)
def test_every_peer_reaches_the_same_cost(peer: peers.Peer, threat: ThreatModel) -> None:
    model = tiny_resnet(channels=[32, 64, 96, 128], stem_width=16)
    images, labels = torch.rand(8, *SIZE), torch.arange(8) % 10
    adversarial = adversarial_set(model, images, labels, threat=threat, steps=1)
    before = count_cost(model, SIZE).macs
    pruned = peers.prune(model, peer, 0.5, SIZE, adversarial, images, 0)
    # where every group loses the same share, all groups round at once
    close = 0.01 if peer.everywhere else 0.05
    assert 1 - count_cost(pruned, SIZE).macs / before == pytest.approx(0.5, abs=close)
    assert count_cost(model, SIZE).macs == before
    assert pruned(images).shape == (8, 10)


def test_pairs_are_compared_seed_by_seed() -> None:
    ours = [cell("curve-l2", 0, "1110"), cell("curve-l2", 1, "1010")]
    theirs = [cell("tp-lamp", 1, "0010"), cell("tp-lamp", 0, "1001")]
    assert summary.paired(ours, theirs, "pgd") == [(0, 1, 1, -1), (1, 0, 0, 0)]
    assert summary.accuracy(ours, "pgd") == pytest.approx(62.5)
    # one run: exact McNemar of 2 against 1
    assert summary.compare(ours[:1], theirs, "pgd") == pytest.approx(1.0)


def test_more_seeds_on_the_same_images_prove_no_more() -> None:
    ours = [cell("curve-l2", s, "1" * 40 + "0" * 60) for s in range(3)]
    theirs = [cell("tp-lamp", s, "0" * 20 + "1" * 33 + "0" * 47) for s in range(3)]
    one = summary.clustered(summary.paired(ours[:1], theirs, "pgd"))
    assert summary.compare(ours, theirs, "pgd") == pytest.approx(one)
    assert 0.1 < one < 0.3  # 20 against 13
    # what one seed wins and another loses on the same images is no win
    assert summary.clustered([(1, 1, 1, 1, 0), (-1, -1, -1, -1, 0)]) == 1.0


def test_targets_are_judged_against_the_best_peer() -> None:
    cells = [
        cell("dense", 0, "1111", ratio=0.0),
        cell("curve-l2", 0, "1110"),
        cell("tp-lamp", 0, "1000"),
        cell("tp-l2-local", 0, "1100"),
    ]
    line = summary.targets(cells)
    assert "curve-l2 75.0 against tp-l2-local 50.0 (pgd, dense 100.0): +25.0 points" in line
    table = summary.tables(cells)
    assert table.index("curve-l2") < table.index("tp-l2-local (best peer)")
    assert table.index("tp-l2-local (best peer)") < table.index("tp-lamp")


def test_what_was_not_measured_together_is_not_compared() -> None:
    ours = [cell("curve-l2", s, "1110") for s in (0, 1, 2)]
    theirs = [cell("tp-lamp", s, "1000") for s in (0, 1)]
    assert math.isnan(summary.compare(ours[2:], theirs, "pgd"))
    assert summary.p_value(summary.compare(ours, theirs, "autoattack")) == ""
    ours[2] = cell("curve-l2", 2, "0000")
    dense = cell("dense", 0, "1111", ratio=0.0)
    line = summary.targets([dense, *ours, *theirs])
    assert "curve-l2 75.0 against tp-lamp 25.0" in line
    assert "(seeds 0, 1)" in line
    assert "±" in summary.spread([cell("tp-lamp", s, "1000") for s in range(8)], "pgd")


def test_finalists_are_the_best_peers_of_each_ratio() -> None:
    stage = Stage("untuned", (0.5, 0.75), (0, 1), ("dense", "curve-l2"), 4, None, 0, 1, "screen")
    done = [
        cell("tp-lamp", 0, "1100", 0.5, "screen"),
        cell("tp-l1-local", 0, "1000", 0.5, "screen"),
        cell("tp-l1-local", 0, "1000", 0.75, "screen"),
        cell("curve-l2", 0, "1111", 0.75, "screen"),
    ]
    assert list(protocol.cells_of(stage, done)) == [
        ("curve-l2", 0.5, 0),
        ("curve-l2", 0.5, 1),
        ("tp-lamp", 0.5, 0),
        ("tp-lamp", 0.5, 1),
        ("curve-l2", 0.75, 0),
        ("curve-l2", 0.75, 1),
        ("tp-l1-local", 0.75, 0),
        ("tp-l1-local", 0.75, 1),
        ("dense", 0.0, 0),
    ]


def test_a_run_is_taken_up_where_it_was(tmp_path: Path) -> None:
    splits = open_data("digits", input_size=SIZE)
    model = tiny_resnet(channels=[32, 64, 96, 128], stem_width=16)
    bench = Bench("tiny", model, splits, ThreatModel.linf("0.1"), 16, 16)
    stage = Stage("screen", (0.5,), (0,), ("dense", "tp-l2-local", "uniform-l2"), n=20)
    told: list[str] = []
    path = tmp_path / "cells.jsonl"
    protocol.run(bench, (stage,), path, told.append)
    assert len(told) == 3
    found = {c.arm: c for c in protocol.read(path)}
    dense = found["dense"].macs
    assert found["uniform-l2"].macs == pytest.approx(dense / 2, rel=0.05)
    assert found["tp-l2-local"].macs == pytest.approx(dense / 2, rel=0.05)
    assert {len(c.pgd) for c in found.values()} == {20}
    path.write_text("".join(line for line in path.open() if "tp-l2" not in line))
    protocol.run(bench, (stage,), path, told.append)
    assert len(told) == 4
    assert "tp-l2-local" in told[-1]
    summary.plot(protocol.read(path), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_levels_name_arms_and_stages_that_exist() -> None:
    for level in LEVELS.values():
        names = [stage.name for stage in level.stages]
        for i, stage in enumerate(level.stages):
            assert set(stage.arms) <= set(protocol.ARMS)
            assert not stage.judged_by or stage.judged_by in names[:i]
        for network in level.networks:
            if level is not LEVELS["gpu"]:
                assert network.create(10, (3, 32, 32)).spec.arch == network.name
