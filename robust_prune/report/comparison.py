"""A comparison of models as one self-contained HTML page, and as rows for a terminal."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from robust_prune.report import comparison_plots as plots
from robust_prune.report.page import templates
from robust_prune.report.plots import PALETTE
from robust_prune.report.rows import ATTACK_NAMES, Table, compact, percent
from robust_prune.report.sentences import threat_text
from robust_prune.untrusted import readable

CHANNELS_SHOWN = 40  # groups that the picture of widths has; the table has all


def to_comparison_html(record: Mapping[str, Any]) -> str:
    """Return one page with tables and pictures inside, no script and nothing to fetch."""
    found = readable(record)
    models, plots_of = found["models"], _pictures(found)
    return (
        templates()
        .get_template("comparison.html")
        .render(
            palette={**PALETTE, **plots.PALETTE},
            record=found,
            title=f"{len(models)} models compared",
            how=comparison_line(found),
            accuracy=accuracy_by_model(found),
            cost=cost_by_model(found),
            curve=curve_table(found),
            widths=width_table(found),
            notes=(*found.get("notes", ()), *_flags(found)),
            examples=[_checked(one) for one in found["examples"]],
            **plots_of,
        )
    )


def comparison_line(record: Mapping[str, Any]) -> str:
    """Return how the accuracies were measured."""
    return (
        f"{record['n']:,} {record['split']} images of {record['data_name']}, the same for all; "
        f"{threat_text(record)}, seed {record['seed']}; 95 % Wilson intervals; p: paired McNemar "
        f"test against {record['models'][0]['name']}"
    )


def accuracy_by_model(record: Mapping[str, Any]) -> Table:
    """Return the accuracy of every model under every attack, and p of the strongest."""
    attacks = [m["attack"] for m in record["models"][0]["measurements"]]
    rows = []
    for model in record["models"]:
        by_attack = {m["attack"]: m["accuracy"] for m in model["measurements"]}
        p = (model["paired"].get(attacks[-1]) or {}).get("p_value")
        rows.append(
            (
                model["name"],
                *(percent(by_attack.get(attack)) for attack in attacks),
                "-" if p is None else f"{p:.2g}",
            )
        )
    head = ("model", *(ATTACK_NAMES.get(a, a) for a in attacks), "p")
    return Table("Accuracy of every model", head, tuple(rows))


def cost_by_model(record: Mapping[str, Any]) -> Table:
    """Return what every model costs and takes, the shares of the first one beside."""
    first = record["models"][0]
    batches = list(first["latency_ms"])
    rows = []
    for model in record["models"]:
        cells = [model["name"]]
        for key in ("macs", "params"):
            share = model["cost"][key] / max(first["cost"][key], 1)
            cells.append(f"{compact(model['cost'][key])} ({100 * share:.0f} %)")
        for batch in batches:
            ms = model["latency_ms"][batch]
            cells.append(f"{ms:.3g} ({100 * ms / first['latency_ms'][batch]:.0f} %)")
        rows.append(tuple(cells))
    head = ("model", "multiply-adds", "parameters", *(f"ms, batch {batch}" for batch in batches))
    return Table("Cost of every model", head, tuple(rows))


def curve_table(record: Mapping[str, Any]) -> Table | None:
    """Return accuracy by eps, a column for each model; None where nothing was attacked."""
    models = [model for model in record["models"] if model["curve"]]
    if not models:
        return None
    rows = tuple(
        (
            plots.eps_text(record["threat"]["norm"], point["eps"]),
            *(percent(model["curve"][i]["accuracy"]) for model in models),
        )
        for i, point in enumerate(models[0]["curve"])
    )
    head = ("eps", *(model["name"] for model in models))
    return Table("Accuracy under PGD-20 by eps", head, rows)


def width_table(record: Mapping[str, Any]) -> Table | None:
    """Return the channels of every group, before and in each model that has a plan."""
    models = [model for model in record["models"] if model["widths"]]
    if not models:
        return None
    names = list(dict.fromkeys(name for model in models for name in model["widths"]))
    rows = []
    for name in names:
        dense = next(m["widths"][name][0] for m in models if name in m["widths"])
        kept = (str(m["widths"][name][1]) if name in m["widths"] else "-" for m in models)
        rows.append((name, str(dense), *kept))
    head = ("group", "before", *(model["name"] for model in models))
    return Table("Channels of every group", head, tuple(rows))


def _pictures(record: Mapping[str, Any]) -> dict[str, Any]:
    models = record["models"]
    curves = any(model["curve"] for model in models)
    widths = width_table(record)
    batch = next(iter(models[0]["latency_ms"]), None)
    return {
        "curve_svg": Markup(plots.security_svg(record)) if curves else None,
        "macs_svg": Markup(plots.cost_svg(record, None)),
        "ms_svg": None if batch is None else Markup(plots.cost_svg(record, batch)),
        "widths_svg": Markup(plots.widths_svg(record))
        if widths and len(widths.rows) <= CHANNELS_SHOWN
        else None,
    }


def _flags(record: Mapping[str, Any]) -> list[str]:
    return [
        f"{model['name']}, {ATTACK_NAMES.get(m['attack'], m['attack'])}: {flag}"
        for model in record["models"]
        for m in model["measurements"]
        for flag in m["flags"]
    ]


def _checked(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an example whose pictures are base64, so that nothing else gets into the page.

    Raises:
        ValueError: they are none.
    """
    for one in (example, *example["models"]):
        try:
            base64.b64decode(one["image"], validate=True)
        except binascii.Error:
            raise ValueError("a picture of the comparison is not base64") from None
    return example
