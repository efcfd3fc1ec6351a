"""`robust-prune info`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust_prune.cli.opening import ModelPath, open_model
from robust_prune.cli.output import Output
from robust_prune.cli.spreading import takes_options
from robust_prune.cli.tables import show_groups, show_report
from robust_prune.errors import ModelError, first_line
from robust_prune.options import LatencyOptions, ModelOptions

if TYPE_CHECKING:
    from robust_prune.graph import ModelGraph


Latency = Annotated[
    bool, typer.Option("--latency", help="Time every layer, and the whole, on this device.")
]


@takes_options()
def info(
    model: ModelPath,
    opening: ModelOptions,
    timing: LatencyOptions,
    output: Output,
    latency: Latency = False,
) -> None:
    """Say what a model file is: architecture, cost, prunable groups, plan and results."""
    from robust_prune import report
    from robust_prune.graph import ModelGraph
    from robust_prune.models import default_input_size
    from robust_prune.modules import ImageModel, empty_blocks, network_of
    from robust_prune.types import to_plain

    module, record = open_model(model, opening, output=output)
    if has_report := "plan" in record and "cost" in record:
        try:
            report.check_record(record)
        except ValueError as error:
            raise ModelError(f"{model}: its report is malformed: {first_line(error)}") from None
    size = opening.input_size
    if isinstance(module, ImageModel):
        spec = module.spec
        size = spec.input_size or default_input_size(spec)
        output.result(f"{spec.source} {spec.arch} {dict(spec.kwargs)}, {spec.num_classes} classes")
        output.result(f"images {size} in [0, 1], mean {spec.mean}, std {spec.std}")
        if spec.input_size is None:
            output.note("the file does not say the size of its images; this is timm's default")
    size = size or (3, 224, 224)
    found = ModelGraph(module, size)
    cost = found.cost()
    output.result(f"{cost.macs:,} multiply-adds, {cost.params:,} parameters")
    show_groups(output, found.groups, cost)
    gone = list(empty_blocks(network_of(module)))
    _show_rest(output, found, gone)
    timed = _show_latency(output, found, timing) if latency else None
    if has_report:
        output.result(f"status: {record['status']}; plan {record['plan_digest']}")
        show_report(output, record)
    elif told := {name: record[name] for name in ("status", "data") if record.get(name)}:
        output.result("; ".join(f"{name} {value}" for name, value in told.items()))
    output.document(
        {
            "model": to_plain(module.spec) if isinstance(module, ImageModel) else None,
            "input_size": size,
            "cost": to_plain(cost),
            "uncounted": found.uncounted,
            **({} if timed is None else {"latency": timed}),
            "groups": to_plain(found.groups),
            "unprunable": to_plain(found.unprunable),
            "empty_blocks": gone,
            "reachable": found.reachable,
            "record": {k: v for k, v in record.items() if k not in ("schema", "model")},
        }
    )


def _show_rest(output: Output, graph: ModelGraph, gone: list[str]) -> None:
    """Print what channels do not tell: work that is not counted, layers and blocks."""
    output.line(f"{100 * graph.reachable:.0f} % of the parameters lie along these channels")
    for line in graph.uncounted:
        output.line(line)
    for item in graph.unprunable:
        output.line(f"{item.name} stays whole: {item.reason}")
    for name in gone:
        output.line(f"{name} went whole: what is left of it is its skip and a constant")


def _show_latency(output: Output, graph: ModelGraph, timing: LatencyOptions) -> dict[str, Any]:
    """Print what every layer takes, and what removing channels could bring."""
    from robust_prune.allocation import Problem, narrowest_without
    from robust_prune.latency import conditions_of, latency_model
    from robust_prune.modules import device_of
    from robust_prune.types import Budget

    conditions = conditions_of(timing, device_of(graph.model))
    found = latency_model(graph, conditions, graph.blocks)
    problem = Problem(graph.groups, graph.cost, Budget("macs", 0.5))
    narrowest, dense = problem.narrowest, found.dense_ms
    least = found.ms(narrowest) / dense
    blocks = {
        block.name: 1 - found.ms(dict.fromkeys(block.groups, 0)) / dense for block in graph.blocks
    }
    least_of_all = found.ms(narrowest_without(problem, [b.groups for b in graph.blocks])) / dense
    output.table(
        f"Milliseconds of {found.conditions}",
        ("layer", "ms", "share", "at its narrowest"),
        [
            (name, f"{ms:.3f}", f"{100 * ms / found.dense_ms:.1f} %", f"{left:.3f}")
            for (name, ms), left in zip(
                found.layer_ms.items(), found.layers_at(narrowest).values(), strict=True
            )
        ],
    )
    if blocks:
        output.table(
            "Residual blocks that can go whole",
            ("block", "of the time"),
            [(name, f"{100 * share:.1f} %") for name, share in blocks.items()],
        )
    output.result(
        f"{dense:.2f} ms; with every group at its narrowest about {100 * least:.0f} % of that"
        + (f", without these blocks about {100 * least_of_all:.0f} %" if blocks else "")
        + ", so that --target latency can remove the rest at most"
    )
    return {
        "conditions": str(found.conditions),
        "dense_ms": dense,
        "least_share": least,
        "least_share_without_blocks": least_of_all,
        "blocks": blocks,
        "layer_ms": found.layer_ms,
    }
