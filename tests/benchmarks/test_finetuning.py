"""The benchmarks of fine-tuning and of collapse: choice, blocks, and runs that are taken up."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import collapse
from benchmarks.criteria.networks import Network, narrow_resnet
from benchmarks.criteria.protocol import BEST, Bench, verdicts
from benchmarks.finetuning import protocol, summary
from benchmarks.finetuning.protocol import (
    FINAL,
    METHODS,
    PEER,
    REACH,
    Block,
    Tuned,
    Workshop,
)
from benchmarks.finetuning.recipes import (
    RECIPES,
    TEXTBOOK,
    Recipe,
    half_labels,
    rslad_cross_entropy,
    same_function,
)
from robust_prune.data import from_iterable
from robust_prune.finetune import Attack
from robust_prune.graph import count_cost
from robust_prune.types import ThreatModel
from tests.conftest import tiny_resnet

SIZE = (3, 8, 8)


def cell(stage: str, arm: str, validation: str, pgd: str = "1100", seed: int = 0) -> Tuned:
    return Tuned("net", stage, arm, 0.75, seed, 10, 5, clean="1111", pgd=pgd, validation=validation)


TRIED = [
    cell(METHODS, f"{BEST}/untuned", "1111"),
    cell(METHODS, f"{BEST}/pgd-at", "1100", pgd="1111"),
    cell(METHODS, f"{BEST}/rslad", "1110", pgd="0000"),
]


def test_validation_chooses_and_test_images_do_not() -> None:
    assert protocol.chosen(TRIED) == "rslad"
    arms = protocol.arms_of(FINAL, TRIED)
    assert arms[:2] == [f"{BEST}/pgd-at", f"{BEST}/rslad"]
    assert f"{PEER}/rslad" in arms
    with pytest.raises(SystemExit, match="comes first"):
        protocol.arms_of(FINAL, [])


def test_blocks_that_every_attacked_model_has_count() -> None:
    cells = [*TRIED, *(cell(FINAL, arm, "11") for arm in ("a/b", "c/d", "e/f"))]
    blocks = [
        Block("a/b", 0, 1, "01", 1.0),
        Block("a/b", 0, 0, "11", 1.0),
        Block("c/d", 0, 0, "10", 1.0),
    ]
    found = {c.arm: c.autoattack for c in protocol.attacked(cells, blocks) if c.stage == FINAL}
    assert found == {"a/b": "11", "c/d": "10", "e/f": ""}


def test_tables_compare_on_the_same_images() -> None:
    finals = [
        cell(FINAL, f"{BEST}/rslad", "1110", pgd="1" * 30),
        cell(FINAL, f"{PEER}/{TEXTBOOK}", "1100", pgd="0" * 20 + "1" * 10),
    ]
    text = summary.tables([*TRIED, *finals])
    assert f"**{BEST}/rslad** (chosen)" in text
    assert (
        f"- {BEST}/rslad against {PEER}/{TEXTBOOK}: clean +0.0 points, p = 1; PGD-20 +66.7" in text
    )


def test_reach_is_where_accuracy_is_a_point_below_the_dense_one() -> None:
    def at(ratio: float, arm: str, stage: str, right: int) -> Tuned:
        verdicts = "1" * right + "0" * (100 - right)
        return replace(cell(stage, arm, "11", pgd=verdicts), ratio=ratio, clean="1" * 100)

    cells = [
        *TRIED,
        at(0.0, "dense/untuned", REACH, 50),
        at(0.75, f"{BEST}/pgd-at", FINAL, 51),
        at(0.9, f"{BEST}/pgd-at", REACH, 45),
        at(0.85, f"{BEST}/pgd-at", REACH, 50),
        at(0.75, f"{PEER}/pgd-at", FINAL, 48),
        at(0.85, f"{PEER}/pgd-at", REACH, 40),
        at(0.75, f"{BEST}/rslad", FINAL, 20),
    ]
    text = summary.tables(cells)
    assert f"- {BEST}/pgd-at: falls below 49.0 % at -86.0 % (dense 50.0)" in text
    assert f"- {PEER}/pgd-at: below 49.0 % already at -75 % (dense 50.0)" in text
    part = text[text.index("`reach`") :]
    assert part.count(f"| {BEST}/pgd-at -") == 3
    assert "rslad" not in part
    assert "still above" in summary.tables(cells[:5])


def test_models_are_made_once_and_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network("tiny", partial(narrow_resnet, width=8), {})
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(120, *SIZE, generator=generator)
    splits = from_iterable(
        [(images, torch.arange(120) % 10)], test=[(images[:20], torch.arange(20) % 10)]
    )
    model = network.create(10, SIZE)
    bench = Bench("tiny", model, splits, ThreatModel.linf("8/255"), 16, 32)
    monkeypatch.setitem(RECIPES, "pgd-at", Recipe("pgd-at", epochs=1, steps=1))
    shop = Workshop(bench, network, tmp_path)
    monkeypatch.setattr(protocol, "TEST_IMAGES", {METHODS: 20, FINAL: 20, REACH: 20})
    monkeypatch.setattr(protocol, "BLOCK", 2)
    # a peer stands for both, planning would take most of the seconds
    peer = "tp-l2-global"
    monkeypatch.setattr(protocol, "BEST", peer)
    out = tmp_path / "record"
    out.mkdir()
    arms = [f"{peer}/pgd-at", f"{peer}/{TEXTBOOK}"]
    said: list[str] = []
    for _ in range(2):
        protocol.run(shop, FINAL, arms, [0], 1, out, said.append)
    assert len(said) == 4  # two models, two blocks, nothing twice
    first, second = protocol.read(out)
    assert first.epochs == 1
    assert second.epochs >= 1
    assert first.macs == second.macs < 0.3 * count_cost(model, SIZE).macs
    again, _ = Workshop(bench, network, tmp_path).tuned(peer, "pgd-at", 0)
    assert splits.test is not None
    found = verdicts(again, splits.test, 20, bench.threat, "pgd")
    assert found["pgd"] == first.pgd
    assert [b.block for b in protocol.read_blocks(out)] == [0, 0]

    narrower = Workshop(bench, network, tmp_path, 0.8)
    for _ in range(2):
        protocol.run(narrower, REACH, arms[:1], [0], 0, out, said.append)
    assert len(said) == 5
    assert protocol.read(out)[-1].macs < first.macs


@pytest.mark.parametrize("method", [half_labels, rslad_cross_entropy, same_function])
def test_distilled_losses_reach_the_model_alone(method: object, threat: ThreatModel) -> None:
    model, teacher = tiny_resnet(), tiny_resnet()
    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    attack = Attack(threat, 1, torch.Generator().manual_seed(0))
    loss = method(model, images, labels, attack, teacher=teacher)  # type: ignore[operator]
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_model_that_is_its_teacher_has_nothing_to_learn(threat: ThreatModel) -> None:
    model = tiny_resnet().eval()
    attack = Attack(threat, 2, torch.Generator().manual_seed(0))
    loss = same_function(model, torch.rand(4, 3, 32, 32), torch.arange(4), attack, teacher=model)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_runs_differ_from_their_end_in_what_their_names_say() -> None:
    for name, factors in collapse.RUNS.items():
        end = collapse.SCRATCH if name.startswith("scratch") else collapse.CAREFUL
        differing = [f for f in vars(end) if getattr(end, f) != getattr(factors, f)]
        assert len(differing) == name.count(",")
    assert collapse.SCRATCH.config(0).method == "n-fgsm"
    assert collapse.CAREFUL.config(0).epochs == 5


def test_the_table_tells_collapsed_runs() -> None:
    def run(name: str, robust: float) -> dict[str, object]:
        epoch = {"clean": 0.3, "single_step": 0.2, "robust": robust}
        epoch |= {"epoch": 1, "batch_clean": 0.3, "batch_robust": 0.1}
        factors = {**vars(collapse.SCRATCH)}
        return {"run": name, "seed": 0, "factors": factors, "images": 512, "epochs": [epoch]}

    rows = collapse.table([run("scratch, eval", 0.2), run("scratch", 0.004)]).splitlines()[2:]
    assert "**collapsed** 0.4" in rows[0]
    assert "collapsed" not in rows[1]
