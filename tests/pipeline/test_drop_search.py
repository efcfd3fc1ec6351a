"""As much as can go within a drop: the search, what it measures, and what it says of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robust_prune import compress, report
from robust_prune.data import DataSplits, as_split
from robust_prune.errors import BudgetError, DataError, UsageError
from robust_prune.pipeline import CompressResult, drop_search, fingerprint, measuring
from robust_prune.pipeline.drop_search import largest
from robust_prune.pipeline.record import Pruned
from robust_prune.statistics import PairedDrop
from tests.conftest import tiny_resnet
from tests.pipeline.test_run_folder import CrashError, fail_after, own_data
from tests.pipeline.test_stations import without_times

TRYING: dict[str, Any] = {
    "target": "params",
    "allocation": "uniform",
    "calibration_images": 4,
    "verify": False,
    "reconstruct": False,
}
WHOLE = sum(p.numel() for p in tiny_resnet(num_classes=5).parameters())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Attacks that a model withstands on as large a share of images as it has parameters left."""
    sizes: list[int] = []

    def verdicts(model: nn.Module, images: Any, labels: torch.Tensor, **more: Any) -> torch.Tensor:
        size = sum(p.numel() for p in model.parameters())
        sizes.append(size)
        return torch.arange(len(labels)) < round(len(labels) * size / WHOLE)

    monkeypatch.setattr(drop_search, "pgd_correct", verdicts)
    monkeypatch.setitem(drop_search.STEP, "untuned", 0.1)
    return sizes


def compressed(n: int = 1000, **options: Any) -> CompressResult:
    return compress(tiny_resnet(num_classes=5), own_data(n), **{**TRYING, **options})


@pytest.mark.parametrize("most", [1, 2, 7, 49])
def test_halving_finds_the_last_place_that_is_within(most: int) -> None:
    for last in range(most + 1):
        asked: list[int] = []
        assert largest(most, lambda place, m=last, a=asked: a.append(place) or place <= m) == last
        assert len(asked) <= math.ceil(math.log2(most + 1))
        assert last == 0 or last in asked
        assert last == most or last + 1 in asked


@pytest.mark.parametrize(("b", "c", "n"), [(0, 0, 50), (9, 4, 100), (4, 9, 100), (50, 0, 50)])
def test_the_interval_of_a_drop(b: int, c: int, n: int) -> None:
    drop = PairedDrop(b, c, n)
    low, high = drop.interval()
    assert drop.value == (b - c) / n
    assert -1 <= low <= drop.value <= high <= 1
    other = PairedDrop(c, b, n).interval()
    assert other == pytest.approx((-high, -low)), "which model comes first changes the sign alone"
    assert drop.interval(0.999)[0] <= low < high <= drop.interval(0.999)[1]


def test_the_interval_is_that_of_the_source() -> None:
    """Agresti and Min's adjustment of 2 pairs: by hand for b = 9, c = 4, n = 100."""
    centre, n = (9.5 - 4.5) / 102, 102
    half = 1.959964 * math.sqrt((9.5 + 4.5) / n - centre**2) / math.sqrt(n)
    assert PairedDrop(9, 4, 100).interval() == pytest.approx((centre - half, centre + half))


def test_the_largest_ratio_within_the_drop_is_taken(asked: list[int]) -> None:
    result = compressed(max_drop=35)
    found = result.report["drop_search"]
    assert found["chosen"] == result.plan.budget.prune_ratio == 0.3
    assert abs(result.plan.reached - found["chosen"]) < 0.015
    ratios = {one["prune_ratio"]: one["within"] for one in found["tried"]}
    assert ratios[found["chosen"]]
    assert not ratios[0.4], "the next one was measured, and is beyond"
    assert (found["models"], found["split"], found["seed"]) == ("un-tuned", "validation", 0)
    assert found["attack"] == "PGD-20, linf 8/255"
    assert asked.count(WHOLE) == 1, "the dense model is attacked once"
    assert all(one["images"] == 100 for one in found["tried"])
    assert result.report["settings"]["budget"] == {"target": "params"}
    assert Pruned.from_plain({"drop_search": found}).plain() == {"drop_search": found}
    report.check_record(result.report)
    assert "Ratios that were tried" in report.to_html(result.report)


@pytest.mark.parametrize(("held_out", "planned_on"), [(300, "validation"), (260, "train")])
def test_no_image_is_judged_on_that_the_plan_was_made_on(
    held_out: int, planned_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = torch.rand(600, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(600) % 5
    parts = [
        as_split((x, y))
        for x, y in (
            (everything[:200], labels[:200]),
            (everything[200 : 200 + held_out], labels[200 : 200 + held_out]),
        )
    ]
    splits = DataSplits("own", parts[0], parts[1], None, 5, (3, 16, 16))
    seen: dict[str, list[torch.Tensor]] = {"planned": [], "judged": []}

    def noted(where: str, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen[where].append(images.flatten(1)[:, 0])
        return torch.ones(len(labels), dtype=torch.bool)

    real = measuring.calibration_images
    monkeypatch.setattr(
        drop_search, "pgd_correct", lambda model, x, y, **more: noted("judged", x, y)
    )

    def drawn(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = real(*args)
        noted("planned", images, labels)
        return images, labels

    monkeypatch.setattr(measuring, "calibration_images", drawn)
    monkeypatch.setitem(drop_search.STEP, "untuned", 0.3)
    compress(tiny_resnet(num_classes=5), splits, **{**TRYING, "calibration_images": 64}, max_drop=5)
    planned, judged = (set(torch.cat(found).tolist()) for found in seen.values())
    assert not planned & judged
    known = set(
        (everything[:200] if planned_on == "train" else everything[200:])[:, 0, 0, 0].tolist()
    )
    assert planned <= known


def test_no_more_images_are_attacked_than_it_takes(
    asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drop_search, "CHUNK", 25)
    tried = compressed(max_drop=10).report["drop_search"]["tried"]
    clear = [one for one in tried if one["drop"] > 0.4]
    close = [one for one in tried if one["drop"] < 0.2]
    assert clear
    assert close
    assert all(one["images"] < 100 for one in clear)
    assert all(one["images"] == 100 for one in close)


def test_what_was_measured_before_a_crash_is_not_measured_again(
    asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compressed(max_drop=30)
    measured = len(asked)
    with monkeypatch.context() as patch:
        fail_after("searched", patch)
        with pytest.raises(CrashError):
            compressed(max_drop=30, run_dir=tmp_path / "run")
    asked.clear()
    again = compressed(max_drop=30, run_dir=tmp_path / "run", resume=True)
    assert len(asked) == measured - 1
    assert without_times(again.report) == without_times(whole.report)
    assert fingerprint(again.model) == fingerprint(whole.model)


def test_tuned_models_are_measured_where_that_is_asked_for(
    asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(drop_search.STEP, "tuned", 0.3)
    trained: list[str] = []
    train_ = drop_search.train_

    def training(model: nn.Module, *parts: Any, **more: Any) -> Any:
        history = train_(model, *parts, **more)
        trained.append(fingerprint(model))
        return history

    monkeypatch.setattr(drop_search, "train_", training)
    result = compressed(
        100, max_drop=40, max_drop_of="tuned", finetune="pgd-at", epochs=1, attack_steps=1
    )
    found = result.report["drop_search"]
    assert (found["models"], found["chosen"]) == ("fine-tuned", 0.3)
    assert len(trained) == len(found["tried"]) == 2
    assert fingerprint(result.model) in trained, "what is delivered is what was measured"


def test_what_can_not_be_searched_for_is_one_line(asked: list[int]) -> None:
    model, data = tiny_resnet(num_classes=5), own_data(1000)
    for error, data_, options, message in (
        (BudgetError, data, {"max_drop": 0.5}, r"already ratio 0\.1 costs 10\.0 points"),
        (UsageError, data, {"max_drop": 1, "prune_ratio": 0.5}, "leave one out"),
        (UsageError, data, {"max_drop": 100}, "in percentage points"),
        (UsageError, data, {"max_drop": 1, "also": {"macs": 0.1}}, "not with --also"),
        (UsageError, data, {"max_drop_of": "tuned"}, "needs --max-drop, and fine-tuning"),
        (DataError, None, {"max_drop": 1}, "name the data"),
        (DataError, data[0], {"max_drop": 1}, "needs labels"),
        (DataError, own_data(12), {"max_drop": 1}, "too few to keep some back"),
    ):
        with pytest.raises(error, match=message) as caught:
            compress(model, data_, **TRYING, **options)
        assert "\n" not in str(caught.value)
