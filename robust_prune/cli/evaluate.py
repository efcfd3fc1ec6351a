"""`robust-prune evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from robust_prune.cli import options as o
from robust_prune.cli.output import Output, duration
from robust_prune.cli.tables import show_evaluation
from robust_prune.errors import UsageError


def evaluate(
    model: o.ModelPath,
    eval_: Annotated[
        o.Eval, typer.Option("--eval", help="none is clean accuracy alone.")
    ] = o.Eval.autoattack,
    n_eval: Annotated[
        int | None, typer.Option(help="Test images; default 200, on a GPU 1,000.", min=1)
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
    """Measure clean, PGD-20 and AutoAttack accuracy on test images, with intervals."""
    output = Output(as_json=as_json, quiet=quiet)
    from robust_prune import evaluation
    from robust_prune.types import to_plain

    module, record = o.open_model(
        model, arch, model_kwargs, cifar_stem, mean, std, input_size, trust_pickle, device
    )
    splits = o.open_splits(module, record, data, data_root, download, workers, input_size)
    if splits is None or splits.test is None:
        raise UsageError(f"{model} records no data; name it with --data")
    threat = o.threat_model(norm, eps, record)
    n = o.eval_images(n_eval, device)
    test = evaluation.draw(splits.test, n, seed)
    if eval_ is o.Eval.autoattack:
        seconds = evaluation.autoattack_seconds(module, test.images, splits.classes, 0.35)
        output.line(f"AutoAttack on {len(test.labels)} images: about {duration(seconds)}")
    result = evaluation.evaluate(
        module,
        test,
        threat=threat,
        attack=eval_.value,
        seed=seed,
        on_progress=lambda line: output.line(f"  {line}"),
    )
    show_evaluation(output, result, splits.name)
    output.document(to_plain(result))
