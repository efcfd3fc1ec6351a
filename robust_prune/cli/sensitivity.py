"""`robust-prune sensitivity`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from robust_prune.cli import options as o
from robust_prune.cli.output import Output
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
    group_of = {group.decided_by: group for group in result.groups}
    of_layers = bool(result.modules)
    rows: list[tuple[str, str, float, str]] = [
        (m.name, f"{m.params:,}", m.mrs, group_of[m.name].name if m.name in group_of else "")
        for m in result.modules
    ] or [(g.name, f"{g.width:,}", g.mrs, "") for g in result.groups]
    top = max(value for _, _, value, _ in rows) or 1.0
    output.table(
        f"MRS ({result.method}, rho {result.rho:g}, {result.n} images, {result.attack} "
        f"{result.threat}, seed {seed}); adversarial loss {result.adversarial_loss:.4f} nats",
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
