"""Evaluation in rounds: as many images as an interval takes, and the same as in one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import robust_prune as rp
from robust_prune import evaluation
from robust_prune.data import Split, as_split
from robust_prune.errors import DataError, UsageError
from robust_prune.evaluation import FIRST, TestImages, draw, evaluate_in_rounds, too_wide
from robust_prune.options import AUTO, EvaluationOptions
from robust_prune.pipeline import Settings
from robust_prune.statistics import PairedDrop, Proportion
from robust_prune.types import Cost, Evaluation, Measurement, ThreatModel
from tests.conftest import randomize_, tiny_resnet

THREAT = ThreatModel.linf("8/255")


def split_of(n: int) -> Split:
    """Images whose one value is their number."""
    images = torch.arange(n).float().view(n, 1, 1, 1) / n
    return as_split((images, torch.zeros(n, dtype=torch.long)))


def judged(test: TestImages, correct: Sequence[bool]) -> Evaluation:
    blind = sum(not c for c in correct)
    details: dict[str, Any] = {"without_gradient": blind, "robust_after": {"square": len(correct)}}
    found = Measurement(
        attack="pgd",
        accuracy=Proportion(sum(correct), len(correct)),
        correct=tuple(correct),
        details=details,
        flags=("masked",) if blind else (),
        seconds=1.0,
    )
    return Evaluation("test", len(correct), 0, THREAT, (found,), Cost(1, 1, 1), 1.0)


class Judge:
    """Verdicts by the value of an image, for as many models as there are shares of wrong ones."""

    def __init__(self, n: int, *wrong: int) -> None:
        self.n, self.wrong = n, wrong
        self.seen: list[int] = []

    def __call__(self, test: TestImages) -> list[Evaluation]:
        self.seen += (test.images.flatten() * self.n).round().int().tolist()
        numbers = (test.images.flatten() * self.n).round().int().tolist()
        return [judged(test, [i % 10 >= wrong for i in numbers]) for wrong in self.wrong]


def test_rounds_take_new_images_until_the_interval_is_narrow() -> None:
    judge = Judge(3000, 5)
    (found,) = evaluate_in_rounds(split_of(3000), judge, margin=3.0, seed=1)
    whole = (draw(split_of(3000), 1600, 1).images.flatten() * 3000).round().int().tolist()
    assert judge.seen == whole  # 200, 400, 800: half of the interval is 3.5 points; 1600: 2.4
    assert found.n == 1600
    assert found.measurements[0].correct == tuple(i % 10 >= 5 for i in whole)
    low, high = found.measurements[0].accuracy.interval
    assert 50 * (high - low) <= 3.0
    assert found.measurements[0].seconds == 4.0
    wrong = 1600 - sum(found.measurements[0].correct)
    assert found.measurements[0].details["without_gradient"] == wrong
    assert found.measurements[0].details["robust_after"] == {"square": 1600}
    assert len(found.measurements[0].flags) == 1  # said once, of all
    assert str(wrong) in found.measurements[0].flags[0]


def test_two_models_are_told_apart_by_their_pairs() -> None:
    """A tenth of the images differ: a tenth as many are needed as for either accuracy."""
    judge = Judge(3000, 5, 6)
    dense, pruned = evaluate_in_rounds(split_of(3000), judge, margin=3.0, seed=1)
    assert dense.n == pruned.n == 400
    pairs = list(zip(dense.measurements[0].correct, pruned.measurements[0].correct, strict=True))
    drop = PairedDrop(sum(a and not b for a, b in pairs), 0, 400)
    low, high = drop.interval()
    assert 50 * (high - low) <= 3.0


def test_of_several_models_the_drop_that_is_known_least_decides() -> None:
    alike = evaluate_in_rounds(split_of(3000), Judge(3000, 5, 5), margin=3.0, seed=1)
    assert alike[0].n == FIRST
    found = evaluate_in_rounds(split_of(3000), Judge(3000, 5, 5, 6), margin=3.0, seed=1)
    assert [evaluation.n for evaluation in found] == [400] * 3
    assert "tell every drop to within" in too_wide(found, 1.0)


def test_where_images_end_first_it_is_said() -> None:
    found = evaluate_in_rounds(split_of(300), Judge(300, 5), margin=3.0, seed=0)
    assert found[0].n == 300
    assert too_wide(found, 3.0).startswith("all 300 test images tell the accuracy to within 5.")
    assert too_wide(found, 6.0) == ""
    both = evaluate_in_rounds(split_of(300), Judge(300, 5, 7), margin=1.0, seed=0)
    assert "tell the drop to within 4." in too_wide(both, 1.0)
    few = evaluate_in_rounds(split_of(FIRST - 1), Judge(FIRST - 1, 5), margin=50.0, seed=0)
    assert few[0].n == FIRST - 1
    with pytest.raises(DataError, match="holds no images"):
        evaluate_in_rounds(Split(TensorDataset(torch.ones(0, 1))), Judge(1, 1), margin=1, seed=0)


def test_compress_measures_both_models_in_rounds_and_goes_on_from_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.rand(500, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(500) % 10
    model = randomize_(tiny_resnet())
    with torch.no_grad():
        labels = model(images).argmax(1)
    asked: dict[str, Any] = {
        "prune_ratio": 0.3,
        "allocation": "uniform",
        "evaluation": "pgd",
        "threat": ThreatModel.linf("1/255"),
        "n_eval": "auto",
        "calibration_images": 16,
    }
    data = images[:64], labels[:64]
    once = rp.compress(model, data, test=(images, labels), margin=4.0, **asked)
    n = once.report["evaluation"]["dense"]["n"]
    assert n in (400, 500)

    sizes: list[int] = []
    evaluate = evaluation.evaluate

    def evaluating(model: Any, test: TestImages, **given: Any) -> Evaluation:
        sizes.append(len(test.labels) if not given["done"] else 0)
        if len(sizes) == 3:  # dense and pruned on the first images, then dense on the next
            raise InterruptedError
        return evaluate(model, test, **given)

    monkeypatch.setattr(evaluation, "evaluate", evaluating)
    kept = {"run_dir": tmp_path / "run", "test": (images, labels), "margin": 4.0, **asked}
    with pytest.raises(InterruptedError):
        rp.compress(model, data, **kept)
    again = rp.compress(model, data, resume=True, **kept)
    assert sizes[:5] == [200, 200, 200, 0, 0]  # what was measured on the first images was kept
    for which in ("dense", "pruned"):
        one, two = (r.report["evaluation"][which] for r in (once, again))
        assert [m["correct"] for m in one["measurements"]] == [
            m["correct"] for m in two["measurements"]
        ]


@pytest.mark.parametrize(("text", "number"), [("auto", AUTO), ("7", 7)])
def test_images_are_a_number_or_auto(text: str, number: int) -> None:
    assert EvaluationOptions(n_eval=text).n_eval == number
    assert Settings(n_eval=text).n_eval == number
    for wrong in ("0", "-1", "many", "1.5"):
        with pytest.raises(UsageError, match="a number from 1 on, or auto"):
            EvaluationOptions(n_eval=wrong)
    with pytest.raises(UsageError, match="margin"):
        EvaluationOptions(margin=0.0)
