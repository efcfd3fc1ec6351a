"""A record as JSON and as one self-contained HTML page."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import jinja2
from markupsafe import Markup

from robust_prune.report import plots, rows, sentences
from robust_prune.untrusted import readable

SCHEMA = "robust-prune/report/2"  # 1 has the options of training as a part of their own
MOST_ROWS_OPEN = 80  # of a picture; a longer one is folded away


def to_json(record: Mapping[str, Any]) -> str:
    """Return the record as JSON; not a number is an error, not a silent NaN."""
    return json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n"


def to_html(record: Mapping[str, Any]) -> str:
    """Return one page with tables and pictures inside, no script and nothing to fetch.

    Every string of the record is untrusted: the template escapes what it is given, and what is
    `Markup` here was drawn by `plots`.
    """
    found = readable(record)
    return (
        templates()
        .get_template("report.html")
        .render(
            palette=plots.PALETTE,
            title=sentences.title(found),
            record=found,
            **_outcome(found),
            **_inside(found),
            **_training(found),
            **_repeating(found),
        )
    )


@functools.cache
def templates() -> jinja2.Environment:
    """Return the templates, with what they call."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("robust_prune.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        share=rows.share, interval=rows.interval, sentence=sentences.sentence
    )
    return environment


def _outcome(record: Mapping[str, Any]) -> dict[str, Any]:
    """What came out: the summary, cost and accuracy, and what to know of them."""
    accuracies = rows.accuracy_rows(record)
    return {
        "summary": sentences.summary(record),
        "evidence": sentences.evidence(record),
        "figures": rows.key_figures(record),
        "warnings": [*record["notes"], *sentences.flags(record)],
        "cost": rows.cost_table(record),
        "headline": sentences.headline(record),
        "accuracies": accuracies,
        "has_untuned": any(row["pruned_before_finetuning"] for row in accuracies),
        "accuracy_svg": Markup(plots.accuracy_svg(accuracies)) if accuracies else None,
    }


def _inside(record: Mapping[str, Any]) -> dict[str, Any]:
    """What was done to the network, and what was measured to decide it."""
    plan, sensitivity, search = record["plan"], record["sensitivity"], record.get("search")
    curves, drops = record.get("curves"), record.get("drop_search")
    return {
        "check_line": sentences.check_line(record),
        "grade_line": sentences.grade_line(record),
        "fit_line": sentences.fit_line(record),
        "whole": sentences.whole_lines(plan),
        "channels": rows.channel_table(plan),
        "channels_svg": Markup(plots.channels_svg(plan["groups"])),
        "mrs_line": sentences.mrs_line(sensitivity),
        "mrs": rows.mrs_table(sensitivity),
        "mrs_svg": Markup(plots.mrs_svg(sensitivity)),
        "curves_svg": Markup(plots.curves_svg(curves)) if curves else None,
        "search_line": sentences.search_line(search) if search else None,
        "search": rows.search_table(search) if search else None,
        "drop_line": sentences.drop_line(record, drops) if drops else None,
        "drops": rows.drop_table(drops) if drops else None,
        "drops_svg": Markup(plots.drops_svg(drops)) if drops else None,
        "most_rows_open": MOST_ROWS_OPEN,
    }


def _training(record: Mapping[str, Any]) -> dict[str, Any]:
    """How the weights that are left were trained, step by step."""
    history = record.get("finetune")
    return {
        "steps": rows.step_table(record) if record.get("steps") else None,
        "training_line": sentences.training_line(history) if history else None,
        "epochs": rows.training_table(history) if history else None,
    }


def _repeating(record: Mapping[str, Any]) -> dict[str, Any]:
    """What it takes to do the same again."""
    machine = {**record["versions"], **record["hardware"], "processes": record.get("processes", 1)}
    return {
        "model": rows.pairs_table("Model", record["model"]),
        "settings": rows.pairs_table("Settings", record["settings"]),
        "machine": rows.pairs_table("Versions and hardware", machine),
        "seconds": rows.seconds_table(record.get("seconds") or {}),
        "total_seconds": sum((record.get("seconds") or {}).values()),
    }
