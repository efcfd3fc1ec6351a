"""`robust-prune sensitivity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robust_prune.cli import options as o
from robust_prune.cli.output import Output
from robust_prune.cli.tables import show_sensitivity
from robust_prune.errors import UsageError


def sensitivity(
    model: o.ModelPath,
    mrs: Annotated[o.MRSMethod, typer.Option(help="Estimator.")] = o.MRSMethod.first_order,
    rho: Annotated[float, typer.Option(help="Radius relative to the weights' norm.")] = 0.1,
    images: Annotated[int, typer.Option(help="Training images to measure on.", min=1)] = 512,
    plot: Annotated[
        Path | None, typer.Option(help="Picture to write (.png, .svg, .pdf); default NAME-mrs.png.")
    ] = None,
    norm: o.NormOption = None,
    eps: o.Eps = None,
    arch: o.Arch = None,
    model_kwargs: o.ModelKwargs = None,
    cifar_stem: o.CifarStem = False,
    mean: o.Mean = None,
    std: o.Std = None,
    input_size: o.InputSize = None,
    trust_pickle: o.TrustPickle = False,
    data: o.DataOption = None,
    data_root: o.DataRoot = None,
    download: o.Download = False,
    workers: o.Workers = None,
    seed: o.Seed = 0,
    device: o.DeviceOption = o.Device.auto,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure module robustness sensitivity (MRS) of every layer and channel group."""
    output = Output(as_json=as_json, quiet=quiet)
    picture = plot or Path(f"{Path(model).stem}-mrs.png")
    if picture.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {picture}: the name must end in .png, .svg or .pdf")
    from robust_prune import report
    from robust_prune.pipeline import sensitivity
    from robust_prune.types import to_plain

    module, record = o.open_model(
        model, arch, model_kwargs, cifar_stem, mean, std, input_size, trust_pickle, device
    )
    splits = o.open_splits(module, record, data, data_root, download, workers, input_size)
    if splits is None:
        output.note("no data is known: measured on synthetic images labelled by the model itself")
    result = sensitivity(
        module,
        splits,
        threat=o.threat_model(norm, eps, record),
        method=mrs.value,
        rho=rho,
        n=images,
        seed=seed,
        input_size=o.image_size(input_size),
        on_module=lambda name: output.line(f"  {name}"),
    )
    show_sensitivity(output, result)
    plain = to_plain(result)
    report.save_mrs_plot(plain, picture)
    output.result(f"wrote {picture} ({result.seconds:.1f} s for MRS itself)")
    output.document(plain)
