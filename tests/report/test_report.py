"""The page: what it says, what it holds, and that strangers' text stays text."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from robust_prune import report
from robust_prune.report import plots, rows, sentences
from robust_prune.untrusted import readable

HOSTILE = [
    "<script>alert(1)</script>",
    "{{7*7}}{% raw %}",
    "\"' onmouseover='alert(1)' x=\"",
    "--></text></svg><img src=x onerror=alert(1)>",
    "]]><style>*{display:none}</style>",
    "$\\frac{$ and $x$",
    "_underscore",
    "&lt;b&gt; &amp;",
    "שם של שכבה",
    "\u202egnp.exe",
    "n" * 5000,
]
TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "section", "p",
    "h1", "h2", "h3", "ul", "li", "dl", "dt", "dd", "div", "span", "b", "i", "small",
    "code", "bdi", "table", "thead", "tbody", "tr", "th", "td", "details", "summary",
    "figure", "svg", "g", "path", "defs", "clippath", "rect", "text", "use",
}  # fmt: skip


def _accuracy(successes: int, n: int = 100) -> dict[str, Any]:
    value = successes / n
    return {
        "successes": successes, "n": n, "confidence": 0.95, "value": value,
        "interval": [max(value - 0.09, 0), min(value + 0.09, 1)],
    }  # fmt: skip


def _evaluation(latency: float, **correct: int) -> dict[str, Any]:
    return {
        "n": 100, "seed": 3, "split": "test", "latency_ms": latency,
        "measurements": [
            {"attack": name, "accuracy": _accuracy(count), "flags": [f"flag of {name}"]}
            for name, count in correct.items()
        ],
    }  # fmt: skip


def _history() -> dict[str, Any]:
    epoch = {"loss": None, "clean": 0.5, "robust": 0.3, "seconds": 1.0, "single_step": None}
    return {
        "method": "pgd-at", "best_epoch": 1, "validation": "PGD-10 on 130 images",
        "how": "sgd", "interrupted": False, "notes": [],
        "epochs": [
            {"epoch": 0, **epoch},
            {"epoch": 1, **epoch, "loss": 1.25, "single_step": 0.4, "images_per_second": 99.0},
        ],
    }  # fmt: skip


def record(name: str = "layer1.conv") -> dict[str, Any]:
    """A record with every part; `name` stands wherever others choose the words."""
    cost = {
        "dense": {"macs": 4_000_000, "params": 300_000, "channels": 96},
        "pruned": {"macs": 2_000_000, "params": 90_000, "channels": 60},
    }
    plan = {
        "budget": {"target": "macs", "prune_ratio": 0.5}, "allocation": "curve", "score": name,
        "input_size": [3, 8, 8], "groups": [
            {"name": name, "width": 64, "keep": list(range(40)), "mrs": 0.1, "note": name},
            {"name": "second", "width": 32, "keep": list(range(20)), "mrs": 0.1, "note": ""},
        ],
        "unprunable": [{"name": name, "reason": "its channels are the model's outputs"}], **cost,
    }  # fmt: skip
    return {
        "schema": report.SCHEMA, "status": "evaluated", "seed": 3, "plan_digest": "abcdef123456",
        "model": {"arch": name, "kwargs": {name: name}}, "data_name": name, "processes": 1,
        "threat": {"norm": "linf", "eps": 8 / 255}, "settings": {"lr": 0.1, "own": {name: [name]}},
        "plan": plan, "cost": cost, "reachable": 0.99,
        "self_check": {"done": True, "error": 2e-12, "images": 2, "dtype": "float64"},
        "reconstruction": {"images": 64, "layers": [{"layer": name, "before": 0.5, "after": 0.1}]},
        "sensitivity": {
            "method": "first-order", "rho": 0.1, "n": 512, "attack": "PGD-10", "seed": 3,
            "adversarial_loss": 1.5, "seconds": 2.0,
            "modules": [
                {"name": name, "kind": "Conv2d", "params": 72, "mrs": 0.1},
                {"name": "second", "kind": "Conv2d", "params": 72, "mrs": 0.0},
            ],
            "groups": [{"name": name, "width": 64, "mrs": 0.1, "decided_by": name}],
        },
        "curves": [{"group": name, "shares": [0.5, 0.9], "rises": [0.1, 0.7]}],
        "search": {
            "attack": "PGD-5", "images": 256, "chosen": 1,
            "candidates": [{"loss": 1.9, "params": 95_000}, {"loss": 1.8, "params": 90_000}],
        },
        "drop_search": {
            "max_drop": 1.0, "models": name, "attack": name, "seed": 3, "split": "validation",
            "chosen": 0.4, "tried": [
                {"prune_ratio": 0.4, "removed": 0.4, "images": 200, "dense": 0.5, "pruned": 0.5,
                 "drop": 0.004, "interval": [-0.01, 0.02], "within": True},
                {"prune_ratio": 0.6, "removed": 0.6, "images": 400, "dense": 0.5, "pruned": 0.4,
                 "drop": 0.1, "interval": [0.05, 0.14], "within": False},
            ],
        },
        "finetune": _history(),
        "steps": [{"plan": {"pruned": cost["dense"]}, "finetune": _history()}],
        "evaluation": {
            "dense": _evaluation(20.0, clean=80, pgd=50, autoattack=45),
            "pruned_before_finetuning": _evaluation(10.0, clean=60, pgd=30),
            "pruned": _evaluation(10.0, clean=78, pgd=44, autoattack=40),
            "paired": {
                attack: {"first_only": 9, "second_only": 4, "p_value": 0.267}
                for attack in ("clean", "pgd", "autoattack")
            },
        },
        "notes": [name, "a note"], "seconds": {"plan": 2.0, "evaluate": 61.0},
        "versions": {"torch": "2.14.1"}, "hardware": {"device": "cpu", "processor": name},
    }  # fmt: skip


class Page(HTMLParser):
    """What a browser would make of a page: its tags, their attributes, its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.mark.parametrize("name", HOSTILE)
def test_strangers_text_stays_text(name: str) -> None:
    text = report.to_html(record(name))
    page = Page(text)
    assert page.tags <= TAGS
    assert not [a for a, _ in page.attributes if a.startswith("on") or a in ("src", "href")]
    assert not [v for a, v in page.attributes if a == "xlink:href" and not v.startswith("#")]
    assert page.words.count(readable(name)) >= 8  # notes, tables, sentences: as it was written
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


@pytest.mark.parametrize("name", HOSTILE)
def test_pictures_hold_names_as_text(name: str) -> None:
    found = readable(record(name))
    label = plots.shortened(found["data_name"], plots.LONGEST_NAME)
    for svg in (
        plots.channels_svg(found["plan"]["groups"]),
        plots.mrs_svg(found["sensitivity"]),
        plots.curves_svg(found["curves"]),
    ):
        words = "".join(ElementTree.fromstring(svg).itertext())
        assert label in words


def test_a_hostile_page_has_the_tags_of_a_harmless_one() -> None:
    harmless = Page(report.to_html(record()))
    for name in HOSTILE:
        page = Page(report.to_html(record(name)))
        assert page.tags == harmless.tags
        assert len(page.attributes) - len(harmless.attributes) in range(-60, 61)
        assert {a for a, _ in page.attributes} == {a for a, _ in harmless.attributes}


def test_the_page_fetches_and_runs_nothing() -> None:
    text = report.to_html(record())
    assert text.startswith("<!doctype html>")
    assert "default-src 'none'" in text
    without_names = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert "://" not in without_names
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_everything_of_the_record_is_on_the_page() -> None:
    words = Page(report.to_html(record())).words
    for part in (
        "-50.0 %", "78.0 %", "[31.0, 49.0]", "0.267", "a note", "dense, AutoAttack: flag of",
        "stays whole: its channels", "2e-12", "0.500 -> 0.100", "rho 0.1, 512 images", "2 (taken)",
        "1 (kept)", "FGSM", "PGD-10 on 130 images", "4,000,000 (100.0 %)", "Time: 63 s", "torch",
        "abcdef123456", "--plan report.json", "own.layer1.conv", "evaluated", "0.4 (taken)",
    ):  # fmt: skip
        assert part in words, part


def _set_p(p: float | None) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        found["evaluation"]["paired"]["autoattack"]["p_value"] = p

    return change


def _only_clean(found: dict[str, Any]) -> None:
    for which in ("dense", "pruned_before_finetuning", "pruned"):
        del found["evaluation"][which]["measurements"][1:]


def _nothing_measured(found: dict[str, Any]) -> None:
    found["evaluation"] = dict.fromkeys(("dense", "pruned_before_finetuning", "pruned"))


def _dense_alone(found: dict[str, Any]) -> None:
    found["evaluation"] |= {"pruned": None, "pruned_before_finetuning": None, "paired": {}}


@pytest.mark.parametrize(
    ("change", "ending"),
    [
        (_set_p(0.267), "dense model on 45.0 %: no difference beyond chance on 100 images."),
        (_set_p(0.01), "right on 40.0 % of the test images, the dense model on 45.0 %: a loss "),
        (_set_p(None), "the dense model on 45.0 %."),
        (_only_clean, "without an attack it is right on 78.0 % of the test images"),
        (_nothing_measured, "how accurate it is was not measured."),
        (_dense_alone, "how accurate it is under attack was not measured."),
    ],
)
def test_the_summary_says_no_more_than_was_measured(change: Any, ending: str) -> None:
    found = copy.deepcopy(record())
    change(found)
    told = sentences.summary(found)
    assert told.startswith("The pruned model needs 50.0 % less computation and has 70.0 % fewer")
    assert ending in told
    assert ending in Page(report.to_html(found)).words


def test_the_evidence_names_n_attack_eps_seed_and_interval() -> None:
    assert sentences.evidence(record()) == (
        "n = 100 test images of layer1.conv; AutoAttack, linf 8/255, seed 3: dense 45.0 % "
        "[36.0, 54.0], pruned 40.0 % [31.0, 49.0] (95 % Wilson intervals); paired McNemar test "
        "p = 0.267."
    )


def test_a_record_without_data_has_a_page() -> None:
    found = record()
    _nothing_measured(found)
    found |= {"finetune": None, "steps": []}
    for part in ("curves", "search", "drop_search", "reconstruction", "self_check"):
        del found[part]
    text = report.to_html(found)
    assert text.count("<svg") == 2
    assert "Fine-tuning</h2>" not in text


@pytest.mark.parametrize(
    ("count", "text"),
    [(331, "331"), (97_991, "98 k"), (999_900, "1 M"), (4_394_240, "4.39 M"), (15 * 10**9, "15 G")],
)
def test_large_counts_are_short(count: int, text: str) -> None:
    assert rows.compact(count) == text


def test_models_have_one_colour_each() -> None:
    """Pictures and tables take it from the page."""
    text = report.to_html(record())
    for name in ("dense", "untuned", "pruned"):
        light, dark = plots.PALETTE[name]
        assert text.count(f"--{name}: {light};") == text.count(f"--{name}: {dark};") == 1
        assert f"fill: var(--{name})" in text
        assert f".swatch.{name} {{ background: var(--{name}); }}" in text


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_mrs_plot_is_a_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plot{suffix}"
    report.save_mrs_plot(record("$\\frac{$")["sensitivity"], path)
    assert path.stat().st_size > 1000


def test_records_of_the_first_schema_are_read() -> None:
    old = record()
    old["schema"] = "robust-prune/report/1"
    old["settings"] = {"method": "first-order", "steps": 1, "training_options": {"ema": 0.875}}
    page = report.to_html(old)
    assert "training_options.ema" in page
    assert "0.875" in page
