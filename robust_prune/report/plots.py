"""Pictures of a record, as SVG that lives inside the page, and as files."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from robust_prune.files import atomic
from robust_prune.report.rows import mrs_rows
from robust_prune.untrusted import readable, shortened

# (on white, on black) of everything that is drawn; told apart by lightness alone, too. The
# curves' four are Okabe and Ito's, which people with any colour vision tell apart.
PALETTE = {
    "ink": ("#1f2328", "#e6edf3"),
    "line": ("#afb8c1", "#484f58"),
    "dense": ("#8a929c", "#7d8590"),
    "untuned": ("#9ecbf2", "#2f5f8f"),
    "pruned": ("#0a5cad", "#6cb6ff"),
    "mrs": ("#b3470f", "#f0883e"),
    "curve-1": ("#d55e00", "#f0883e"),
    "curve-2": ("#009e73", "#2dc494"),
    "curve-3": ("#cc79a7", "#e29cc2"),
    "curve-4": ("#e69f00", "#f2b632"),
}
SERIES = (
    ("dense", "dense", "dense"),
    ("pruned_before_finetuning", "un-tuned", "untuned"),
    ("pruned", "pruned", "pruned"),
)
WIDTH = 5.0  # inches: letters of 10 points are readable where this is shown on a telephone
LONGEST_NAME = 30
_VARIABLE = {light: f"var(--{name})" for name, (light, _) in reversed(PALETTE.items())}


def colour(name: str) -> str:
    """Return the colour of a thing on white."""
    return PALETTE[name][0]


def accuracy_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw the accuracy of every model under every attack, with its interval."""
    return svg("Accuracy under every attack", lambda axes: _accuracy(axes, rows), 2.6)


def channels_svg(groups: Sequence[Mapping[str, Any]]) -> str:
    """Draw how many channels every group had and keeps."""
    return svg("Channels of every group", lambda axes: _channels(axes, groups), tall(len(groups)))


def mrs_svg(sensitivity: Mapping[str, Any]) -> str:
    """Draw MRS by layer."""
    rows = mrs_rows(sensitivity)
    return svg("MRS of every layer", lambda axes: _mrs(axes, rows), tall(len(rows)))


def curves_svg(curves: Sequence[Mapping[str, Any]]) -> str:
    """Draw every group's loss over the share of its channels that goes."""
    return svg("Structural sensitivity", lambda axes: _curves(axes, curves), 4.2)


def drops_svg(found: Mapping[str, Any]) -> str:
    """Draw what every ratio of a search cost, with its interval, and the limit."""
    return svg("Robust accuracy lost at every ratio", lambda axes: _drops(axes, found), 2.8)


def save_mrs_plot(sensitivity: Mapping[str, Any], path: Path) -> None:
    """Draw MRS by layer into a PNG, SVG or PDF file, by its suffix."""
    rows = mrs_rows(readable(sensitivity))
    with _style():
        figure, axes = _figure(tall(len(rows)))
        _mrs(axes, rows)
        with atomic(path) as temporary:
            figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=150)


def _accuracy(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    series = [s for s in SERIES if any(row[s[0]] for row in rows)]
    width = 0.8 / len(series)
    for number, (key, label, name) in enumerate(series):
        offset = (number - (len(series) - 1) / 2) * width
        shown = [(i + offset, row[key]) for i, row in enumerate(rows) if row[key]]
        values = [100 * a["value"] for _, a in shown]
        ends = [(100 * a["interval"][0], 100 * a["interval"][1]) for _, a in shown]
        axes.bar(
            [x for x, _ in shown],
            values,
            0.9 * width,
            yerr=[
                [value - low for value, (low, _) in zip(values, ends, strict=True)],
                [high - value for value, (_, high) in zip(values, ends, strict=True)],
            ],
            error_kw={"elinewidth": 1, "capsize": 3, "capthick": 1},
            color=colour(name),
            ecolor=colour("ink"),
            label=label,
        )
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 100)
    _legend_above(axes, len(series))


def _channels(axes: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    rows = range(len(groups))
    widths, kept = [g["width"] for g in groups], [len(g["keep"]) for g in groups]
    axes.barh(rows, widths, color=colour("dense"), height=0.72, label="dense")
    axes.barh(rows, kept, color=colour("pruned"), height=0.72, label="pruned")
    axes.set_xlabel("channels")
    _legend_above(axes, 2)
    name_rows(axes, [g["name"] for g in groups])


def _mrs(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw one bar for each, on a logarithmic axis; what has next to nothing has no bar."""
    top = max((row["mrs"] for row in rows), default=0.0)
    top = top if top > 0 else 1.0
    least = max(min((row["mrs"] for row in rows if row["mrs"] > 0), default=top) / 2, top / 1e5)
    axes.barh(
        range(len(rows)),
        [max(row["mrs"], least) for row in rows],
        color=colour("mrs"),
        height=0.72,
    )
    axes.set_xscale("log")
    axes.set_xlim(least, 1.2 * top)
    _few_ticks(axes.xaxis, top / least)
    axes.set_xlabel("MRS: rise of the adversarial loss (nats)")
    name_rows(axes, [row["name"] for row in rows])


def _curves(axes: Any, curves: Sequence[Mapping[str, Any]]) -> None:
    """Draw the steepest curves in colours with their names, the others thin."""
    ranked = sorted(curves, key=lambda c: -max(c["rises"]))
    lines = []
    for place, curve in enumerate(ranked):
        look: dict[str, Any] = {"lw": 0.6, "color": colour("line"), "zorder": 1}
        if place < 8:
            dashes = "-" if place < 4 else (0, (4, 1.5))
            look = {"lw": 1.8, "color": colour(f"curve-{place % 4 + 1}"), "ls": dashes}
        shares = [0, *(100 * s for s in curve["shares"])]
        lines += axes.plot(shares, [0, *curve["rises"]], **look)
    axes.set_xlabel("channels of the group removed (%)")
    axes.set_ylabel("rise of the adversarial loss (nats)")
    legend = axes.figure.legend(
        lines[:8], [str(place) for place in range(len(lines[:8]))],
        loc="outside lower center", ncols=2, frameon=False, fontsize=9,
    )  # fmt: skip
    # matplotlib leaves out labels that begin with an underscore, but not texts that are set later
    for text, curve in zip(legend.get_texts(), ranked, strict=False):
        text.set(text=shortened(curve["group"], LONGEST_NAME), parse_math=False)


def _drops(axes: Any, found: Mapping[str, Any]) -> None:
    tried = found["tried"]
    ratios = [100 * one["prune_ratio"] for one in tried]
    drops = [100 * one["drop"] for one in tried]
    ends = [[100 * end for end in one["interval"]] for one in tried]
    axes.axhline(found["max_drop"], color=colour("mrs"), lw=1.2, ls="--", label="limit")
    axes.errorbar(
        ratios,
        drops,
        yerr=[
            [drop - low for drop, (low, _) in zip(drops, ends, strict=True)],
            [high - drop for drop, (_, high) in zip(drops, ends, strict=True)],
        ],
        fmt="o",
        color=colour("pruned"),
        ecolor=colour("pruned"),
        elinewidth=1,
        capsize=3,
        label="measured, with its 95 % interval",
    )
    axes.set_xlabel("removed, as asked for (%)")
    axes.set_ylabel("points lost")
    _legend_above(axes, 2)


def _few_ticks(axis: Any, span: float) -> None:
    """Number a logarithmic axis by powers of ten, within two of them by 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 100 else (1,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend_above(axes: Any, columns: int) -> None:
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)


def name_rows(axes: Any, names: Sequence[str]) -> None:
    """Name the rows of a picture, from the top."""
    # a dollar sign in a name is no formula
    labels = [shortened(name, LONGEST_NAME) for name in names]
    axes.set_yticks(range(len(names)), labels, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)


def tall(rows: int) -> float:
    """Return the height of a picture of so many rows, in inches."""
    return 1.0 + 0.2 * max(rows, 3)


def _figure(height: float) -> tuple[Any, Any]:
    """Return an empty figure and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


@contextlib.contextmanager
def _style(**more: str) -> Iterator[None]:
    import matplotlib

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), "ink")
    lines = {"axes.edgecolor": "line"}
    colours = {key: colour(name) for key, name in {**ink, **lines}.items()}
    with matplotlib.rc_context({"font.size": 10, "legend.fontsize": "medium", **colours, **more}):
        yield


def svg(
    label: str,
    draw: Callable[[Any], None],
    height: float,
    more: Mapping[str, tuple[str, str]] | None = None,
) -> str:
    """Return an SVG element whose words are text and whose colours are the page's.

    `more` are colours beside the palette's.

    Its words are escaped by matplotlib's XML writer. Ids of groups are taken out: they would be
    the same in every picture of the page.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _style(**{"svg.hashsalt": label, "svg.fonttype": "none"}), warnings.catch_warnings():
        # the page is shown in fonts of the reader's, which have letters that matplotlib's has not
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        figure, axes = _figure(height)
        draw(axes)
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    text = re.sub(r'<g id="[\w.]+">', "<g>", text[text.index("<svg") :])
    names = {light: f"var(--{name})" for name, (light, _) in (more or {}).items()} | _VARIABLE
    text = re.sub(
        r"(fill|stroke): (#[0-9a-f]{6})\b",
        lambda found: f"{found[1]}: {names.get(found[2], found[2])}",
        text,
    )
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
