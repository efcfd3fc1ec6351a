"""`robust-prune train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from robust_prune.cli import options as o
from robust_prune.cli.output import Output
from robust_prune.errors import Interrupted, UsageError


def train(
    arch: Annotated[
        str | None,
        typer.Option(help="timm name, or torchvision/NAME.", rich_help_panel=o.MODEL),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", help="Model file to go on from.", rich_help_panel=o.MODEL),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default ARCH-DATA.safetensors.")
    ] = None,
    method: Annotated[str, typer.Option(help="trades, pgd-at, n-fgsm, or a function.")] = "pgd-at",
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    clean_epochs: Annotated[int, typer.Option(help="Epochs on clean images first.", min=0)] = 2,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.05,
    steps: Annotated[int, typer.Option(help="PGD steps of the attack.", min=1)] = 7,
    batch_size: Annotated[int, typer.Option(min=2)] = 128,
    norm: o.NormOption = None,
    eps: o.Eps = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from timm's weights.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
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
    """Train a network adversarially; the epoch most robust on validation images is kept."""
    output = Output(as_json=as_json, quiet=quiet)
    if (arch is None) == (start is None):
        raise UsageError("say what to train: --arch NAME for a new network, or --from FILE")
    if data in (None, "none") and start is None:
        raise UsageError("training needs data: --data cifar10, digits, or an image folder")

    from robust_prune import builders, models, pipeline, settings
    from robust_prune import data as datasets
    from robust_prune import record as records
    from robust_prune.finetune.loop import TrainingConfig
    from robust_prune.modules import ImageModel
    from robust_prune.types import to_plain

    threat = o.threat_model(norm, eps)
    config = TrainingConfig(
        method=method,
        epochs=epochs,
        threat=threat,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        clean_epochs=clean_epochs,
        seed=seed,
    )
    target = out or Path(f"{(arch or Path(str(start)).stem).replace('/', '-')}-trained.safetensors")
    if target.exists() and not force:
        raise UsageError(f"{target} exists; name another with --out, or --force overwrites it")
    if not target.parent.is_dir():
        raise UsageError(f"--out {target}: there is no folder {target.parent}")
    device_name = o.pick_device(device)
    if start is not None:
        model, record = o.open_model(
            start, None, model_kwargs, cifar_stem, mean, std, input_size, trust_pickle, device
        )
        splits = o.open_splits(model, record, data, data_root, download, workers)
        if splits is None:
            raise UsageError(f"{start} records no data; name it with --data")
        spec = model.spec if isinstance(model, ImageModel) else None
    else:
        kwargs = o.builder_kwargs(model_kwargs) or {}
        size = o.image_size(input_size)
        splits = datasets.open_data(
            str(data),
            input_size=size,
            channels=kwargs.get("in_chans"),
            data_root=data_root,
            download=download,
            workers=workers,
        )
        channels = splits.input_size[0]
        kwargs = {"num_classes": splits.classes, **kwargs}
        if channels != 3:
            kwargs.setdefault("in_chans", channels)
        statistics = (None, None) if pretrained else splits.statistics()
        spec = builders.resolve(
            str(arch),
            kwargs,
            cifar_stem=cifar_stem,
            mean=o.numbers(mean, "--mean") or statistics[0],
            std=o.numbers(std, "--std") or statistics[1],
        )
        model = None
    if spec is None:
        raise UsageError(f"{start} is of a class that only Python code can build; train it there")
    spec = replace(spec, input_size=splits.input_size)
    output.line(
        f"{spec.arch}: {method}, {epochs} epochs, {threat}, {len(splits.train)} training and "
        f"{len(splits.validation or ())} validation images of {splits.name}, seed {seed}"
    )
    with output.training() as (on_progress, on_epoch):
        events = settings.Events(training=on_progress, epoch=on_epoch)
        trained, history = pipeline.train_model(
            spec,
            splits,
            config,
            device=device_name,
            pretrained=pretrained,
            start=model,
            events=events,
        )
    if isinstance(trained, ImageModel):
        trained.spec = spec
    for line in history.notes:
        output.note(line)
    record = {
        "data": dict(splits.source),
        "threat": to_plain(threat),
        "training": records.plain_history(history),
        "status": "trained" if not history.interrupted else "training interrupted",
    }
    if history.interrupted and len(history.epochs) < 2:
        raise Interrupted("stopped before the first epoch ended; no file was written")
    models.save(trained, target, record)
    best = history.epochs[history.best_epoch]
    output.result(
        f"wrote {target}: epoch {best.epoch}, clean {100 * best.clean:.1f} %, robust "
        f"{100 * best.robust:.1f} % ({history.validation}, {threat})"
    )
    output.document({"file": str(target), **record})
    if history.interrupted:
        raise Interrupted(f"stopped; {target} holds the best epoch so far")
