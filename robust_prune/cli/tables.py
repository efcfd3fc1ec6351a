"""The tables of the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from robust_prune.cli.output import Output

if TYPE_CHECKING:
    from robust_prune.types import ChannelGroup, Cost, Evaluation, Sensitivity


def show_report(output: Output, record: Mapping[str, Any]) -> None:
    """Print what a compression came to: cost, accuracy, and what attacks said of themselves."""
    from robust_prune import report

    size = record["plan"]["input_size"]
    output.table(
        f"Cost at {'x'.join(map(str, size))}",
        ("", "dense", "pruned", "change"),
        report.cost_rows(record),
    )
    output.line(report.check_line(record))
    if grade := report.grade_line(record):
        output.line(grade)
    if (found := record.get("drop_search")) is not None:
        tried = report.drop_table(found)
        output.table(report.drop_line(record, found), tried.head, tried.rows)
    if accuracies := report.accuracy_table(record):
        label = f"{accuracies.label}: {report.headline(record)}"
        output.table(label, accuracies.head, accuracies.rows)
    for line in report.flags(record):
        output.note(line)


def show_groups(output: Output, groups: Sequence[ChannelGroup], cost: Cost) -> None:
    """Print which channels can only be removed together."""
    output.table(
        f"{len(groups)} prunable groups, {cost.channels:,} channels",
        ("group", "channels", "layers that lose them", "layers that read them"),
        [(g.name, str(g.width), str(len(g.members)), str(len(g.readers))) for g in groups],
    )


def show_evaluation(output: Output, result: Evaluation, data_name: str) -> None:
    """Print a model's accuracy under every attack, and what attacks said of themselves."""
    from robust_prune.report import ATTACK_NAMES

    output.table(
        f"{result.n} test images of {data_name}, {result.threat}, seed {result.seed}, "
        "95 % Wilson intervals",
        ("attack", "accuracy", "seconds"),
        [
            (ATTACK_NAMES.get(m.attack, m.attack), str(m.accuracy), f"{m.seconds:.0f}")
            for m in result.measurements
        ],
    )
    for measured in result.measurements:
        for flag in measured.flags:
            output.note(f"{measured.attack}: {flag}")


def show_sensitivity(output: Output, result: Sensitivity) -> None:
    """Print the MRS of every layer with the group it decides, or that of every group."""
    group_of = {group.decided_by: group for group in result.groups}
    of_layers = bool(result.modules)
    rows: list[tuple[str, str, float, str]] = [
        (m.name, f"{m.params:,}", m.mrs, group_of[m.name].name if m.name in group_of else "")
        for m in result.modules
    ] or [(g.name, f"{g.width:,}", g.mrs, "") for g in result.groups]
    top = max(value for _, _, value, _ in rows) or 1.0
    output.table(
        f"MRS ({result.method}, rho {result.rho:g}, {result.n} images, {result.attack} "
        f"{result.threat}, seed {result.seed}); adversarial loss {result.adversarial_loss:.4f} "
        "nats",
        ("layer", "parameters", "MRS (nats)", "", "decides group")
        if of_layers
        else ("group", "channels", "MRS (nats)", "", ""),
        [(name, size, f"{v:.4g}", _bar(v, top), decides) for name, size, v, decides in rows],
    )


def _bar(value: float, top: float, width: int = 20) -> str:
    """A bar over two decades below the largest value."""
    share = 1 + math.log10(max(value, 1e-12) / top) / 2
    return ("█" * round(width * max(share, 0.0))).ljust(width)
