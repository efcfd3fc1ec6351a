"""`robust-prune info`."""

from __future__ import annotations

from robust_prune.cli.opening import ModelPath, open_model
from robust_prune.cli.output import Output
from robust_prune.cli.spreading import takes_options
from robust_prune.cli.tables import show_groups, show_report
from robust_prune.errors import ModelError, first_line
from robust_prune.options import ModelOptions


@takes_options()
def info(model: ModelPath, opening: ModelOptions, output: Output) -> None:
    """Say what a model file is: architecture, cost, prunable groups, plan and results."""
    from robust_prune import report
    from robust_prune.graph import ModelGraph
    from robust_prune.models import default_input_size
    from robust_prune.modules import ImageModel
    from robust_prune.types import to_plain

    module, record = open_model(model, opening)
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
    output.line(f"{100 * found.reachable:.0f} % of the parameters lie along these channels")
    for line in found.uncounted:
        output.line(line)
    for item in found.unprunable:
        output.line(f"{item.name} stays whole: {item.reason}")
    if has_report:
        output.result(f"status: {record['status']}; plan {record['plan_digest']}")
        show_report(output, record)
    elif record:
        output.result(f"status: {record.get('status')}; data {record.get('data')}")
    output.document(
        {
            "model": to_plain(module.spec) if isinstance(module, ImageModel) else None,
            "input_size": size,
            "cost": to_plain(cost),
            "uncounted": found.uncounted,
            "groups": to_plain(found.groups),
            "unprunable": to_plain(found.unprunable),
            "reachable": found.reachable,
            "record": {k: v for k, v in record.items() if k not in ("schema", "model")},
        }
    )
