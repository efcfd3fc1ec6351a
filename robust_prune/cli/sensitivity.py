"""`robust-prune sensitivity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robust_prune.cli.opening import (
    ModelPath,
    assumed_of,
    open_model,
    open_splits,
    pick_device,
    threat_model,
)
from robust_prune.cli.output import Output
from robust_prune.cli.spreading import takes_options
from robust_prune.cli.tables import show_sensitivity
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
    module, record = open_model(model, opening, pick_device(running), output)
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
    show_sensitivity(output, result)
    plain = to_plain(result)
    report.save_mrs_plot(plain, picture)
    output.result(f"wrote {picture} ({result.seconds:.1f} s for MRS itself)")
    output.document({**plain, **assumed_of(record)})
