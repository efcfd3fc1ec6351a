"""A run's record as JSON, as one self-contained HTML page, and as pictures."""

from __future__ import annotations

import html
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SCHEMA = "robust-prune/report/1"
ATTACK_NAMES = {"clean": "clean", "pgd": "PGD-20", "autoattack": "AutoAttack"}
INK, DENSE, PRUNED, ACCENT = "#24292f", "#9aa4b1", "#1f6feb", "#d1642f"


def to_json(record: Mapping[str, Any]) -> str:
    """Return the record as JSON; not a number is an error, not a silent NaN."""
    return json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n"


def accuracy_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per attack: name, n, and proportion of each model, p-value where paired."""
    found = record.get("evaluation") or {}
    rows = []
    for attack, name in ATTACK_NAMES.items():
        row: dict[str, Any] = {"attack": attack, "name": name}
        for which in ("dense", "pruned_before_finetuning", "pruned"):
            measured = (found.get(which) or {}).get("measurements", ())
            row[which] = next((m["accuracy"] for m in measured if m["attack"] == attack), None)
        row["p_value"] = ((found.get("paired") or {}).get(attack) or {}).get("p_value")
        if row["dense"] or row["pruned"]:
            rows.append(row)
    return rows


def cost_rows(record: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return (what, dense, pruned, removed) for multiply-adds, parameters, channels, latency."""
    dense, pruned = record["cost"]["dense"], record["cost"]["pruned"]
    rows = []
    for key, name in (
        ("macs", "multiply-adds"),
        ("params", "parameters"),
        ("channels", "channels"),
    ):
        gone = 1 - pruned[key] / max(dense[key], 1)
        rows.append((name, f"{dense[key]:,}", f"{pruned[key]:,}", f"-{100 * gone:.1f} %"))
    found = record.get("evaluation") or {}
    before = (found.get("dense") or {}).get("latency_ms")
    after = (found.get("pruned") or {}).get("latency_ms")
    if before and after:
        change = f"{100 * (after / before - 1):+.0f} %"
        count = min(32, found["dense"]["n"])
        rows.append((f"ms for {count} images", f"{before:.1f}", f"{after:.1f}", change))
    return rows


def percent(accuracy: Mapping[str, Any] | None) -> str:
    """Return `52.0 % [45.1, 58.8]`, or a dash where nothing was measured."""
    if accuracy is None:
        return "-"
    low, high = accuracy["interval"]
    return f"{100 * accuracy['value']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def headline(record: Mapping[str, Any]) -> str:
    """Return how the accuracies were measured: n, split, threat, seed, interval."""
    dense = (record.get("evaluation") or {}).get("dense")
    if not dense:
        return "accuracy was not measured"
    threat = threat_text(record)
    return (
        f"{dense['n']} {dense['split']} images of {record['data_name']}, {threat}, "
        f"seed {dense['seed']}; 95 % Wilson intervals; p: paired McNemar test"
    )


def threat_text(record: Mapping[str, Any]) -> str:
    """Return `linf 8/255`."""
    from robust_prune.types import ThreatModel

    return str(ThreatModel(**record["threat"]))


def flags(record: Mapping[str, Any]) -> list[str]:
    """Return AutoAttack's own warnings, with the model they are about."""
    lines = []
    for which in ("dense", "pruned"):
        for measured in ((record.get("evaluation") or {}).get(which) or {}).get("measurements", ()):
            lines += [
                f"{which}, {ATTACK_NAMES[measured['attack']]}: {line}" for line in measured["flags"]
            ]
    return lines


def check_line(record: Mapping[str, Any]) -> str:
    """Return what could be pruned, and how the result compares with masking."""
    line = f"{100 * record.get('reachable', 1):.0f} % of the parameters lie along channels that "
    line += "can be removed"
    check = record.get("self_check") or {}
    if check.get("done"):
        line += (
            f"; the pruned model's logits equal the masked dense one's to {check['error']:.0e} "
            f"({check['images']} images, {check['dtype']})"
        )
    return line


def grade_line(record: Mapping[str, Any]) -> str:
    """Return what the plan was decided on and what that is worth; empty for older records."""
    found = record.get("calibration")
    if not found:
        return ""
    advice = f"; {found['advice']}" if found["advice"] else ""
    return f"{found['grade']} (labels: {found['labels']}){advice}"


def fit_line(record: Mapping[str, Any]) -> str:
    """Return what reconstruction did to the layers that are left."""
    fitted = record.get("reconstruction")
    if not fitted or not fitted["layers"]:
        return "no weights were reconstructed"
    before, after = (
        statistics.median(layer[key] for layer in fitted["layers"]) for key in ("before", "after")
    )
    return (
        f"weights of {len(fitted['layers'])} layers were fitted to the dense model's activations "
        f"on {fitted['images']} images, adversarial and clean: median relative squared error "
        f"{before:.3f} -> {after:.3f}"
    )


def search_line(record: Mapping[str, Any]) -> str:
    """Return which allocation was chosen, and over which."""
    search = record["search"]
    losses = ", ".join(f"{c['loss']:.3f}" for c in search["candidates"])
    return (
        f"candidates from equal shares to free curves, pruned and attacked by {search['attack']} "
        f"on {search['images']} images: losses {losses} nats; number {search['chosen'] + 1} was "
        "taken"
    )


def to_html(record: Mapping[str, Any]) -> str:
    """Return one page with tables and pictures inside, no script and nothing to fetch."""
    plan = record["plan"]
    budget = plan["budget"]
    reached = 1 - plan["pruned"][budget["target"]] / plan["dense"][budget["target"]]
    title = f"{record['model']['arch']}, {100 * reached:.1f} % of the {budget['target']} removed"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>status: <b>{html.escape(record['status'])}</b>; plan <code>{record['plan_digest']}"
        f"</code>, allocation <b>{html.escape(plan['allocation'])}</b>, channel score <b>"
        f"{html.escape(plan['score'])}</b>, seed {record['seed']}</p>",
        "<h2>Cost</h2>",
        _table(("", "dense", "pruned", ""), cost_rows(record)),
        "<h2>Accuracy</h2>",
        f"<p>{html.escape(headline(record))}</p>",
        f"<p>{html.escape(grade_line(record))}</p>",
    ]
    rows = accuracy_rows(record)
    if rows:
        parts += [_accuracy_table(rows), _svg(lambda axes: _plot_accuracy(axes, rows), (6.4, 2.6))]
    parts += [
        "<h2>Channels</h2>",
        f"<p>{html.escape(check_line(record))}</p>",
        f"<p>{html.escape(fit_line(record))}</p>",
        _svg(lambda axes: _plot_channels(axes, plan["groups"]), _tall(len(plan["groups"]))),
        "<h2>Module robustness sensitivity</h2>",
        f"<p>{html.escape(_mrs_line(record['sensitivity']))}</p>",
        _svg(
            lambda axes: plot_mrs(axes, mrs_rows(record["sensitivity"])),
            _tall(len(mrs_rows(record["sensitivity"]))),
        ),
    ]
    if record.get("curves"):
        parts += [
            "<h2>Structural sensitivity</h2>",
            f"<p>{html.escape(search_line(record))}</p>",
            _svg(lambda axes: _plot_curves(axes, record["curves"]), (6.4, 4.0)),
        ]
    if record.get("steps"):
        parts += ["<h2>Steps</h2>", _steps_table(record)]
    if record.get("finetune"):
        parts += ["<h2>Fine-tuning</h2>", _training_table(record["finetune"])]
    parts += ["<h2>What to know</h2>", _list([*record["notes"], *flags(record), *_fixed(plan)])]
    parts += [
        "<h2>Settings</h2>",
        f"<pre>{html.escape(json.dumps(record['settings'], indent=1, sort_keys=True))}</pre>",
        f"<p class=small>{html.escape(json.dumps(record['versions']))} "
        f"{html.escape(json.dumps(record['hardware']))}</p>",
    ]
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


def save_mrs_plot(sensitivity: Mapping[str, Any], path: Path) -> None:
    """Draw MRS by layer into a PNG, SVG or PDF file, by its suffix."""
    from robust_prune.files import atomic

    rows = mrs_rows(sensitivity)
    figure = _figure(_tall(len(rows)))
    plot_mrs(figure.add_subplot(), rows)
    with atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=150)


def mrs_rows(sensitivity: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return what has an MRS: the layers, or the groups where it is measured on groups."""
    rows: Sequence[Mapping[str, Any]] = sensitivity["modules"] or sensitivity["groups"]
    return rows


def plot_mrs(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw one bar per layer or group, on a logarithmic axis."""
    names = [m["name"] for m in rows]
    values = [max(m["mrs"], 1e-9) for m in rows]
    axes.barh(range(len(names)), values, color=ACCENT, height=0.7)
    axes.set_xscale("log")
    axes.set_xlabel("MRS: rise of the adversarial loss (nats)")
    _name_rows(axes, names)


def _plot_curves(axes: Any, curves: Sequence[Mapping[str, Any]]) -> None:
    """Draw every group's curve, the steepest ones named."""
    ranked = sorted(curves, key=lambda c: -max(c["rises"]))
    named = {c["group"] for c in ranked[:8]}
    for curve in curves:
        shown = curve["group"] in named
        axes.plot(
            [0, *(100 * s for s in curve["shares"])],
            [0, *curve["rises"]],
            lw=1.4 if shown else 0.6,
            color=None if shown else DENSE,
            label=curve["group"] if shown else None,
        )
    axes.set_xlabel("channels of the group removed (%)")
    axes.set_ylabel("rise of the adversarial loss (nats)")
    axes.legend(frameon=False, fontsize=7, title="steepest", title_fontsize=7)


def _plot_channels(axes: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    rows = range(len(groups))
    axes.barh(rows, [g["width"] for g in groups], color=DENSE, height=0.7, label="dense")
    axes.barh(rows, [len(g["keep"]) for g in groups], color=PRUNED, height=0.7, label="kept")
    axes.set_xlabel("channels")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    _name_rows(axes, [g["name"] for g in groups])


def _plot_accuracy(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    series = (
        ("dense", "dense", DENSE),
        ("pruned_before_finetuning", "pruned, before fine-tuning", "#a9c7f5"),
        ("pruned", "pruned", PRUNED),
    )
    for offset, (key, label, colour) in zip((-0.27, 0.0, 0.27), series, strict=True):
        shown = [(i, row[key]) for i, row in enumerate(rows) if row[key]]
        if not shown:
            continue
        values = [100 * a["value"] for _, a in shown]
        errors = [
            [v - 100 * a["interval"][0] for v, (_, a) in zip(values, shown, strict=True)],
            [100 * a["interval"][1] - v for v, (_, a) in zip(values, shown, strict=True)],
        ]
        axes.bar(
            [i + offset for i, _ in shown],
            values,
            0.25,
            yerr=errors,
            capsize=3,
            color=colour,
            ecolor=INK,
            label=label,
        )
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _tall(rows: int) -> tuple[float, float]:
    return 6.4, 1.0 + 0.19 * max(rows, 3)


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _svg(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    import matplotlib

    figure = _figure(size)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    draw(axes)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "robust-prune"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return f"<figure>{text[text.index('<svg') :]}</figure>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    body = [
        (
            row["name"],
            percent(row["dense"]),
            percent(row["pruned_before_finetuning"]),
            percent(row["pruned"]),
            "-" if row["p_value"] is None else f"{row['p_value']:.3g}",
        )
        for row in rows
    ]
    return _table(("attack", "dense", "pruned, before fine-tuning", "pruned", "p"), body)


def _training_table(history: Mapping[str, Any]) -> str:
    single = any(e.get("single_step") is not None for e in history["epochs"])
    rows = [
        (
            f"{e['epoch']}{' (kept)' if e['epoch'] == history['best_epoch'] else ''}",
            "-" if e["loss"] is None else f"{e['loss']:.4f}",
            f"{100 * e['clean']:.1f} %",
            *([_share(e.get("single_step"))] if single else []),
            f"{100 * e['robust']:.1f} %",
            f"{e['seconds']:.0f}",
            f"{e.get('images_per_second') or 0:.0f}",
        )
        for e in history["epochs"]
    ]
    caption = (
        f"<p>{html.escape(history['method'])}; {html.escape(history.get('how', ''))}; selected by "
        f"{html.escape(history['validation'])}</p>"
    )
    head = ("epoch", "loss", "clean", *(["FGSM"] if single else []), "robust", "seconds")
    return caption + _table((*head, "images/s"), rows)


def _steps_table(record: Mapping[str, Any]) -> str:
    """One row for each pruning step: what was left, and the epoch that was gone on with."""
    dense = record["cost"]["dense"]["macs"]
    steps = [(step["plan"]["pruned"]["macs"], step["finetune"]) for step in record["steps"]]
    steps.append((record["cost"]["pruned"]["macs"], record["finetune"]))
    rows = []
    for number, (macs, history) in enumerate(steps, 1):
        best = history["epochs"][history["best_epoch"]] if history and history["epochs"] else None
        rows.append(
            (
                str(number),
                f"{macs:,} ({100 * macs / dense:.1f} %)",
                str(len(history["epochs"]) - 1) if history else "0",
                _share(best and best["clean"]),
                _share(best and best["robust"]),
            )
        )
    head = ("step", "multiply-adds left", "epochs", "clean, validation", "robust, validation")
    return _table(head, rows)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _mrs_line(s: Mapping[str, Any]) -> str:
    structural = s["method"] == "structural"
    return (
        f"{s['method']}, {'half of each group' if structural else 'rho ' + format(s['rho'], 'g')}, "
        f"{s['n']} images, {s['attack']}, seed {s['seed']}; adversarial loss "
        f"{s['adversarial_loss']:.4f} nats; {s['seconds']:.1f} s."
        f"{'' if structural else ' A group of layers takes the largest value of its members.'}"
    )


def _fixed(plan: Mapping[str, Any]) -> list[str]:
    fixed = [f"{item['name']} stays whole: {item['reason']}" for item in plan["unprunable"]]
    return fixed + [f"{g['name']}: {g['note']}" for g in plan["groups"] if g["note"]]


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #24292f; max-width: 46rem;
  margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
table {{ border-collapse: collapse }} td, th {{ padding: .25rem .8rem .25rem 0; text-align: left;
  border-bottom: 1px solid #d8dee4; font-variant-numeric: tabular-nums }}
figure {{ margin: 1rem 0 }} svg {{ max-width: 100%; height: auto }}
pre, .small {{ font-size: 12px; background: #f6f8fa; padding: .6rem; overflow-x: auto }}
</style></head><body>
{body}
</body></html>
"""
