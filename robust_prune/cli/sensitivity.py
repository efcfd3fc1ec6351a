"""`robust-prune sensitivity`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from robust_prune.cli.opening import ModelPath, open_model, open_splits, pick_device, threat_model
from robust_prune.cli.output import Output
from robust_prune.cli.spreading import takes_options
from robust_prune.errors import UsageError
from robust_prune.options import (
    DataOptions,
    ModelOptions,
    RunOptions,
    SensitivityOptions,
    ThreatOptions,
)

Plot = Annotated[
    Path | None,
    typer.Option(help="Picture to write (.png, .svg, .pdf); default NAME-mrs.png."),
]


@takes_options()
def sensitivity(
    model: ModelPath,
    measuring: SensitivityOptions,
    threat: ThreatOptions,
    opening: ModelOptions,
    data: DataOptions,
    running: RunOptions,
    output: Output,
    plot: Plot = None,
) -> None:
    """Measure module robustness sensitivity (MRS) of every layer and channel group."""
    picture = plot or Path(f"{Path(model).stem}-mrs.png")
    if picture.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {picture}: the name must end in .png, .svg or .pdf")
    from robust_prune import report
    from robust_prune.pipeline import sensitivity
    from robust_prune.types import to_plain

    threat_model(threat)  # what is typed is checked before anything is opened
    module, record = open_model(model, opening, pick_device(running))
    splits = open_splits(module, record, data, opening.input_size)
    if splits is None:
        output.note(
            "no data is known: measured on stand-in photographs with the model's own labels"
        )
    result = sensitivity(
        module,
        splits,
        threat=threat_model(threat, record),
        estimator=measuring.estimator,
        rho=measuring.rho,
        n=measuring.images,
        seed=running.seed,
        input_size=opening.input_size,
        on_module=lambda name: output.line(f"  {name}"),
    )
    group_of = {group.decided_by: group for group in result.groups}
    of_layers = bool(result.modules)
    rows: list[tuple[str, str, float, str]] = [
        (m.name, f"{m.params:,}", m.mrs, group_of[m.name].name if m.name in group_of else "")
        for m in result.modules
    ] or [(g.name, f"{g.width:,}", g.mrs, "") for g in result.groups]
    top = max(value for _, _, value, _ in rows) or 1.0
    output.table(
        f"MRS ({result.method}, rho {result.rho:g}, {result.n} images, {result.attack} "
        f"{result.threat}, seed {running.seed}); adversarial loss "
        f"{result.adversarial_loss:.4f} nats",
        ("layer", "parameters", "MRS (nats)", "", "decides group")
        if of_layers
        else ("group", "channels", "MRS (nats)", "", ""),
        [(name, size, f"{v:.4g}", _bar(v, top), decides) for name, size, v, decides in rows],
    )
    plain = to_plain(result)
    report.save_mrs_plot(plain, picture)
    output.result(f"wrote {picture} ({result.seconds:.1f} s for MRS itself)")
    output.document(plain)


def _bar(value: float, top: float, width: int = 20) -> str:
    """A bar over two decades below the largest value."""
    share = 1 + math.log10(max(value, 1e-12) / top) / 2
    return ("█" * round(width * max(share, 0.0))).ljust(width)
