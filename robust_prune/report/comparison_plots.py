"""Pictures of a comparison: one colour and one mark for each model, in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robust_prune.report.plots import LONGEST_NAME, colour, name_rows, svg, tall
from robust_prune.report.rows import ATTACK_NAMES, compact
from robust_prune.untrusted import shortened

# (on white, on black); Okabe and Ito's, which people with any colour vision tell apart
PALETTE = {
    "series-0": ("#59636f", "#9aa4ae"),
    "series-1": ("#0072b2", "#56b4e9"),
    "series-2": ("#d55e01", "#f0883f"),
    "series-3": ("#009e74", "#2dc495"),
    "series-4": ("#cc79a8", "#e29cc3"),
    "series-5": ("#e69f01", "#f2b633"),
}
MARKS = "osD^vP"
LINES = ("-", "--", "-.", ":")


def eps_text(norm: str, eps: float) -> str:
    """Return `8/255` for linf, else the number."""
    if norm != "linf":
        return f"{eps:g}"
    return "0" if eps == 0 else f"{255 * eps:.4g}/255"


def security_svg(record: Mapping[str, Any]) -> str:
    """Draw accuracy against eps, with intervals."""
    return svg("Accuracy against eps", lambda axes: _security(axes, record), 3.4, PALETTE)


def cost_svg(record: Mapping[str, Any], batch: Any) -> str:
    """Draw accuracy against multiply-adds, or against milliseconds at a batch."""
    what = "multiply-adds" if batch is None else f"milliseconds, batch {batch}"
    return svg(f"Accuracy against {what}", lambda axes: _cost(axes, record, batch), 3.4, PALETTE)


def widths_svg(record: Mapping[str, Any]) -> str:
    """Draw the channels of every group, before and in each model that has a plan."""
    models = [(i, m) for i, m in enumerate(record["models"]) if m["widths"]]
    names = list(dict.fromkeys(name for _, model in models for name in model["widths"]))
    height = tall(len(names) * max(1, len(models) * 2 // 3))
    return svg(
        "Channels of every group", lambda axes: _widths(axes, models, names), height, PALETTE
    )


def _security(axes: Any, record: Mapping[str, Any]) -> None:
    norm = record["threat"]["norm"]
    for i, model in enumerate(record["models"]):
        if not model["curve"]:
            continue
        eps = [255 * p["eps"] if norm == "linf" else p["eps"] for p in model["curve"]]
        values = [100 * p["accuracy"]["value"] for p in model["curve"]]
        low, high = _ends([p["accuracy"] for p in model["curve"]])
        axes.fill_between(eps, low, high, color=_colour(i), alpha=0.15, lw=0)
        axes.plot(
            eps,
            values,
            color=_colour(i),
            marker=MARKS[i % len(MARKS)],
            ms=4,
            ls=LINES[i % len(LINES)],
            lw=1.6,
            label=str(i),
        )
    at = record["threat"]["eps"] * (255 if norm == "linf" else 1)
    axes.axvline(at, color="#59636f", lw=0.8, ls=":")
    axes.set_xlabel("eps (of 255)" if norm == "linf" else f"eps ({norm})")
    axes.set_ylabel("accuracy under PGD-20 (%)")
    axes.set_ylim(bottom=0)
    _legend(axes, record)


def _cost(axes: Any, record: Mapping[str, Any], batch: Any) -> None:
    """Draw a point a model, of clean accuracy hollow, of the strongest attack filled."""
    from matplotlib.ticker import FuncFormatter

    for i, model in enumerate(record["models"]):
        x = model["cost"]["macs"] if batch is None else model["latency_ms"][batch]
        shown = [model["measurements"][0], model["measurements"][-1]]
        for measured in shown[: len(model["measurements"])]:
            accuracy = measured["accuracy"]
            value = 100 * accuracy["value"]
            low, high = accuracy["interval"]
            axes.errorbar(
                [x],
                [value],
                yerr=[[value - 100 * low], [100 * high - value]],
                fmt=MARKS[i % len(MARKS)],
                ms=7,
                mfc=_colour(i) if measured is shown[1] else "none",
                color=_colour(i),
                ecolor=_colour(i),
                elinewidth=1,
                capsize=3,
                label=str(i) if measured is shown[1] else None,
            )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    if batch is None:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: compact(int(v))))
        axes.set_xlabel("multiply-adds of an image")
    else:
        axes.set_xlabel(f"milliseconds, batch {batch}")
    last = record["models"][0]["measurements"][-1]["attack"]
    name = ATTACK_NAMES.get(last, "attack")
    axes.set_ylabel(f"accuracy (%): {name} filled,\nclean hollow")
    _legend(axes, record)


def _widths(axes: Any, models: Sequence[tuple[int, Mapping[str, Any]]], names: list[str]) -> None:
    dense = {n: w for _, m in models for n, (w, _) in m["widths"].items()}
    axes.barh(range(len(names)), [dense[n] for n in names], color=colour("line"), height=0.86)
    height = 0.8 / len(models)
    for place, (i, model) in enumerate(models):
        offset = (place - (len(models) - 1) / 2) * height
        kept = [model["widths"].get(n, (0, 0))[1] for n in names]
        axes.barh(
            [row + offset for row in range(len(names))], kept, color=_colour(i), height=0.9 * height
        )
    axes.set_xlabel("channels; grey: before")
    name_rows(axes, names)


def _legend(axes: Any, record: Mapping[str, Any]) -> None:
    """Name the models above; set as text, since labels would hide names with an underscore."""
    handles, labels = axes.get_legend_handles_labels()
    legend = axes.figure.legend(
        handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=9
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        name = record["models"][int(label)]["name"]
        text.set(text=shortened(name, LONGEST_NAME), parse_math=False)


def _ends(accuracies: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    pairs = [accuracy["interval"] for accuracy in accuracies]
    return [100 * low for low, _ in pairs], [100 * high for _, high in pairs]


def _colour(place: int) -> str:
    return PALETTE[f"series-{place % len(PALETTE)}"][0]
