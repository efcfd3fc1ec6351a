"""Models side by side: what is measured of each, the examples, the page, the command."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import robust_prune as rp
from robust_prune import comparing, report
from robust_prune.errors import UsageError
from robust_prune.evaluation import TestImages, rounds
from robust_prune.graph import ModelGraph
from robust_prune.latency import measuring
from robust_prune.types import ThreatModel, to_plain
from robust_prune.untrusted import readable
from tests.cli.test_cli import run  # noqa: F401 - a fixture
from tests.conftest import tiny_resnet
from tests.graph.test_graph import random_plan
from tests.oracles import Saying
from tests.report.test_report import HOSTILE, TAGS, Page

SMALL = ThreatModel("linf", 0.002)  # some images of a random network withstand it
SHARES = (1.0, 2.0)


@pytest.fixture(scope="module")
def test_images() -> TestImages:
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = tiny_resnet()(images).argmax(1)
    labels[:4] = (labels[:4] + 1) % 10  # some are wrong without an attack
    return TestImages(images, labels, "test", 0, 10)


@pytest.fixture(scope="module")
def record(test_images: TestImages) -> dict[str, Any]:
    dense = tiny_resnet()
    graph = ModelGraph(dense, (3, 32, 32), probe=False)
    plan = random_plan(graph, 0.4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "PAIR_MS", 1.0)
        patch.setattr(comparing, "EPS_SHARES", SHARES)
        found: dict[str, Any] = to_plain(
            rp.compare(
                {"dense": dense, "small": graph.pruned(plan)},
                test_images,
                threat=SMALL,
                batches=(2,),
                records={"small": {"plan": to_plain(plan)}},
            )
        )
    return found


def test_every_figure_is_what_the_parts_say(
    record: dict[str, Any], test_images: TestImages
) -> None:
    judged = rp.evaluate(tiny_resnet(), test_images, threat=SMALL, attack="pgd")
    dense, small = record["models"]
    assert [m["accuracy"] for m in dense["measurements"]] == [
        to_plain(m.accuracy) for m in judged.measurements
    ]
    curve = {point["eps"]: point["accuracy"] for point in dense["curve"]}
    assert list(curve) == [0.0, *(s * SMALL.eps for s in SHARES)]
    assert curve[0.0] == dense["measurements"][0]["accuracy"]
    assert curve[SMALL.eps] == dense["measurements"][1]["accuracy"]
    double = rp.evaluate(
        tiny_resnet(), test_images, threat=ThreatModel("linf", 2 * SMALL.eps), attack="pgd"
    )
    assert curve[2 * SMALL.eps] == to_plain(double.measurements[1].accuracy)
    assert (dense["paired"], set(small["paired"])) == ({}, {"clean", "pgd"})
    for mine, theirs in zip(dense["measurements"], small["measurements"], strict=True):
        pairs = list(zip(mine["correct"], theirs["correct"], strict=True))
        told = small["paired"][mine["attack"]]
        assert told["first_only"] == pairs.count(("1", "0"))
        assert told["second_only"] == pairs.count(("0", "1"))
    assert dense["measurements"][0]["correct"] != small["measurements"][0]["correct"]
    assert small["cost"]["macs"] < dense["cost"]["macs"]
    assert all(kept <= width for width, kept in small["widths"].values())
    assert set(dense["latency_ms"]) == {"2"}


def test_examples_are_pictures_that_models_disagree_on(
    record: dict[str, Any], test_images: TestImages
) -> None:
    shown = record["examples"]
    assert len(shown) == comparing.EXAMPLES
    split = [len({m["right"][1] for m in one["models"]}) == 2 for one in shown]
    assert split == sorted(split, reverse=True)
    for one in shown:
        assert one["index"] >= 4, "images that are wrong without an attack come last"
        clean = test_images.images[one["index"]]
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(one["image"]))))
        assert picture.shape == (32, 32, 3)
        assert np.abs(picture / 255 - clean.permute(1, 2, 0).numpy()).max() <= 0.51 / 255
        for model in one["models"]:
            assert (model["clean"] == one["label"]) == model["right"][0]
            assert (model["attacked"] == one["label"]) == model["right"][1]


def test_the_first_examples_are_those_that_models_disagree_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(comparing, "_attacked", lambda model, images, *more: images)
    labels = torch.zeros(12, dtype=torch.long)
    mine, theirs = labels.clone(), labels.clone()
    mine[:2] = 1  # wrong without an attack
    theirs[[5, 9]] = 1
    test = TestImages(torch.rand(12, 3, 4, 4), labels, "test", 0, 10)
    models = {"a": Saying(mine), "b": Saying(theirs)}
    shown = comparing.examples(models, test, SMALL, 0, ["cat", "dog"])
    assert [one["index"] for one in shown] == [5, 9, 2, 3, 4, 6]
    assert [m["attacked"] for m in shown[0]["models"]] == ["cat", "dog"]


def test_large_and_odd_images_are_shown_small_and_grey() -> None:
    for shape, size in (((3, 300, 200), (150, 224)), ((1, 8, 8), (8, 8)), ((5, 8, 6), (6, 8))):
        picture = Image.open(io.BytesIO(base64.b64decode(comparing._png(torch.rand(shape)))))
        assert picture.size == size
        assert picture.mode == ("RGB" if shape[0] == 3 else "L")


def renamed(record: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The record with strangers' words wherever others choose them, each in its turn."""
    found: dict[str, Any] = json.loads(json.dumps(record))
    words = itertools.cycle(names)
    found["models"][1]["name"], found["data_name"] = next(words), next(words)
    found["models"][1]["measurements"][1]["flags"] = [next(words)]
    found["models"][1]["widths"] |= {name: [8, 4] for name in names}
    for one in found["examples"]:
        one["label"] = next(words)
        one["models"][1]["name"] = one["models"][1]["clean"] = next(words)
    return found


@pytest.mark.parametrize("names", [["small"], HOSTILE[:5], HOSTILE[5:]])
def test_the_page_has_all_and_strangers_text_stays_text(
    record: dict[str, Any], names: list[str]
) -> None:
    text = report.to_comparison_html(renamed(record, names))
    page = Page(text)
    assert page.tags <= TAGS | {"img"}
    assert not [a for a, _ in page.attributes if a.startswith("on") or a == "href"]
    sources = [v for a, v in page.attributes if a == "src"]
    assert len(sources) == 3 * comparing.EXAMPLES
    assert all(re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", v) for v in sources)
    assert all(page.words.count(readable(name)) >= 2 for name in names)
    assert len(re.findall("<svg", text)) == 4
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    for part in ("PGD-20", "Security curve", "0.51/255", "ms, batch 2", "16 test images"):
        assert part in page.words, part


def test_a_picture_that_is_none_is_refused(record: dict[str, Any]) -> None:
    found = renamed(record, ["small"])
    found["examples"][0]["models"][0]["image"] = '"><script>'
    with pytest.raises(ValueError, match="not base64"):
        report.to_comparison_html(found)


def test_as_many_images_as_the_margin_takes(
    test_images: TestImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "FIRST", 4)
    models = {"a": tiny_resnet(), "b": tiny_resnet(1), "c": tiny_resnet(2)}

    def compared(data: Any, margin: float) -> dict[str, Any]:
        return rp.compare(
            models,
            data,
            attack="none",
            n="auto",
            margin=margin,
            batches=(),
            seed=3,
        )

    data = [(test_images.images, test_images.labels)]
    few = compared(data, 50)
    assert (few["n"], few["margin"], few["notes"]) == (4, 50, [])
    whole = compared(iter(data), 0.1)  # can be read once
    assert whole["n"] == 16
    assert "all 16 test images tell every drop" in whole["notes"][0]
    assert "all 16 test images tell every drop" in report.to_comparison_html(to_plain(whole))
    for name, row in zip(models, whole["models"], strict=True):
        judged = rp.evaluate(models[name], data, attack="none", n=16, seed=3)
        assert row["measurements"][0]["accuracy"] == to_plain(judged.measurements[0].accuracy)
    with pytest.raises(UsageError, match="drawn already"):
        compared(test_images, 1)


def test_one_model_is_none_to_compare(test_images: TestImages) -> None:
    with pytest.raises(UsageError, match="two models or more"):
        rp.compare({"a": tiny_resnet()}, test_images)


def test_the_command(
    run: Callable[..., tuple[int, str, str]],  # noqa: F811
) -> None:
    Path("small").mkdir()
    Path("small/report.json").write_text("{}")
    rp.save(tiny_resnet(), "dense.safetensors")
    rp.save(tiny_resnet(1), "small/dense.safetensors")
    few = ["--data", "digits", "--n-eval", 4, "--eval", "none", "--batches", 0]
    code, out, err = run("compare", "dense.safetensors", "small", *few, "--json")
    assert code == 0, err
    found = json.loads(out)["comparison"]
    assert [model["name"] for model in found["models"]] == ["dense", "small"]
    assert found["examples"] == []
    assert json.loads(Path("comparison/compare.json").read_text()) == found
    page = Path("comparison/compare.html").read_text()
    assert "Security curve</h2>" not in page
    few[3] = "auto"
    code, out, err = run(
        *("compare", "dense.safetensors", "small", *few),
        *("--margin", 50, "--force", "--json"),
    )
    assert code == 0, err
    assert json.loads(out)["comparison"]["n"] == rounds.FIRST
    for arguments, message in (
        (["dense.safetensors", "small", *few], "--force"),
        (["dense.safetensors", *few], "two models or more"),
        (["dense.safetensors", "small", "--force"], "--data"),
        (["dense.safetensors", "dense.safetensors", *few, "--force"], "named twice"),
        (["dense.safetensors", "small", *few[:-1], "1,x", "--force"], "give numbers from 1 on"),
    ):
        code, _, err = run("compare", *arguments)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
