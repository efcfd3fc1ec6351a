"""`robust-prune train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust_prune.cli import options as o
from robust_prune.cli.output import Output
from robust_prune.cli.resuming import arguments_again, arguments_of, arguments_typed
from robust_prune.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from torch import nn

    from robust_prune.data import DataSplits
    from robust_prune.types import ModelSpec


def train(
    ctx: typer.Context,
    arch: Annotated[
        str | None,
        typer.Option(help="timm name, or torchvision/NAME.", rich_help_panel=o.MODEL),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", help="Model file to go on from.", rich_help_panel=o.MODEL),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default NAME-trained.safetensors.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="pgd-at, trades, mart, n-fgsm, any of them with +awp, package.module:function; "
            "rslad and ard with --teacher."
        ),
    ] = "pgd-at",
    teacher: Annotated[
        str | None, typer.Option(help="Model file that rslad and ard learn from.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    clean_epochs: Annotated[int, typer.Option(help="Epochs on clean images first.", min=0)] = 2,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.05,
    batch_size: Annotated[int, typer.Option(min=2)] = 128,
    attack_steps: o.AttackSteps = 7,
    optimizer: o.Optimizer = "sgd",
    schedule: o.Schedule = "one-cycle",
    ema: o.EMA = 0.0,
    clip_grad: o.ClipGrad = None,
    label_smoothing: o.LabelSmoothing = 0.0,
    eps_warmup: o.EpsWarmup = 0,
    attack_batchnorm: o.AttackBatchNorm = "eval",
    cutout: o.Cutout = 0,
    randaugment: o.RandAugment = False,
    patience: o.Patience = None,
    on_collapse: o.OnCollapse = "switch",
    amp: o.AMP = None,
    attack_amp: o.AttackAMP = None,
    channels_last: o.ChannelsLast = False,
    norm: o.NormOption = None,
    eps: o.Eps = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from timm's weights.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    resume: o.Resume = None,
    tensorboard: o.TensorBoard = False,
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
    """Train a network adversarially; the last epoch is kept that is not less robust than others.

    The run's state is kept beside the file, in NAME.run/, until it is complete: --resume NAME.run
    goes on.
    """
    arguments = arguments_of(ctx)
    if resume is not None:
        from robust_prune.pipeline import RunFolder

        recorded = RunFolder(resume).config().get("arguments") or {}
        arguments = arguments_again(ctx, recorded, "method", resume)
    _train(SimpleNamespace(**arguments_typed(arguments)), arguments, resume)


def _train(a: SimpleNamespace, arguments: dict[str, Any], resume: Path | None) -> None:
    """Do what the arguments say."""
    if (a.arch is None) == (a.start is None):
        raise UsageError("say what to train: --arch NAME for a new network, or --from FILE")
    if a.data in (None, "none") and a.start is None:
        raise UsageError("training needs data: --data cifar10, digits, or an image folder")

    from robust_prune.finetune import TrainingConfig, needs_teacher, resolve_method
    from robust_prune.models import open_model
    from robust_prune.pipeline import Events, go_on_text, train_file

    config = TrainingConfig(
        method=a.method,
        epochs=a.epochs,
        threat=o.threat_model(a.norm, a.eps),
        attack_steps=a.attack_steps,
        batch_size=a.batch_size,
        lr=a.lr,
        clean_epochs=a.clean_epochs,
        seed=a.seed,
        **{name: getattr(a, name) for name in o.TRAINING_OPTIONS},
    )
    processes = o.all_processes(a.device)
    output = Output(as_json=a.as_json, quiet=a.quiet, silent=not processes.first)
    target = processes.on_first(lambda: _target(a, resume))
    model, record, spec, splits = _model_and_data(a)
    threat = o.threat_model(a.norm, a.eps, record)
    config = replace(config, threat=threat)
    teacher = None
    if a.teacher is not None:
        if not needs_teacher(resolve_method(a.method)[1]):
            raise UsageError(f"--teacher: {a.method} does not learn from a model; rslad and ard do")
        teacher, _ = open_model(a.teacher, device=o.pick_device(a.device))
    output.line(
        f"{spec.arch}: {a.method}, {a.epochs} epochs, {threat}, {len(splits.train)} training and "
        f"{len(splits.validation or ())} validation images of {splits.name}, seed {a.seed}"
    )
    with output.training(target.parent if a.tensorboard else None) as (on_progress, on_epoch):
        result = train_file(
            spec,
            splits,
            config,
            target,
            Events(note=output.note, training=on_progress, epoch=on_epoch),
            arguments=arguments,
            resume=resume is not None,
            device=o.pick_device(a.device),
            pretrained=a.pretrained,
            start=model,
            teacher=teacher,
            processes=processes,
        )
    history = result.history
    best = history.epochs[history.best_epoch]
    output.result(
        f"wrote {target}: epoch {best.epoch}, clean {100 * best.clean:.1f} %, robust "
        f"{100 * best.robust:.1f} % ({history.validation}, {threat})"
    )
    output.document({"file": str(target), **result.record})
    if history.interrupted:
        raise Interrupted(
            f"stopped; {target} holds the best epoch so far{go_on_text(target, arguments)}"
        )


def _target(a: SimpleNamespace, resume: Path | None) -> Path:
    """Return the file to write, if it may be written."""
    if resume is not None:
        folder = resume.resolve()
        if folder.suffix != ".run":
            raise UsageError(f"--resume {resume}: the folder of a training run is named NAME.run")
        return folder.with_suffix("")
    stem = a.arch or Path(str(a.start)).stem
    target: Path = a.out or Path(f"{stem.replace('/', '-')}-trained.safetensors")
    if not target.parent.is_dir():
        raise UsageError(f"--out {target}: there is no folder {target.parent}")
    if a.force:
        return target
    if target.exists():
        raise UsageError(f"{target} exists; name another with --out, or --force overwrites it")
    from robust_prune.pipeline import run_path

    state = run_path(target)
    if state.exists():
        raise UsageError(
            f"{state} holds a run that is not complete; --resume {state} goes on with it, --force "
            "starts anew"
        )
    return target


def _model_and_data(
    a: SimpleNamespace,
) -> tuple[nn.Module | None, dict[str, Any], ModelSpec, DataSplits]:
    """Return the model to start from and its record, how to build it, and the data.

    A new one is None, with an empty record.
    """
    from robust_prune.data import open_data
    from robust_prune.models import resolve_spec
    from robust_prune.modules import ImageModel

    if a.start is not None:
        model, record = o.open_model(
            a.start,
            None,
            a.model_kwargs,
            a.cifar_stem,
            a.mean,
            a.std,
            a.input_size,
            a.trust_pickle,
            a.device,
        )
        found = o.open_splits(model, record, a.data, a.data_root, a.download, a.workers)
        if found is None:
            raise UsageError(f"{a.start} records no data; name it with --data")
        if not isinstance(model, ImageModel):
            raise UsageError(
                f"{a.start} is of a class that only Python code can build; train it there"
            )
        return model, record, replace(model.spec, input_size=found.input_size), found
    kwargs = o.builder_kwargs(a.model_kwargs) or {}
    splits = open_data(
        str(a.data),
        input_size=o.image_size(a.input_size),
        channels=kwargs.get("in_chans"),
        data_root=a.data_root,
        download=a.download,
        workers=a.workers,
    )
    channels = splits.input_size[0]
    kwargs = {"num_classes": splits.classes, **kwargs}
    if channels != 3:
        kwargs.setdefault("in_chans", channels)
    statistics = (None, None) if a.pretrained else splits.statistics()
    spec = resolve_spec(
        str(a.arch),
        kwargs,
        cifar_stem=a.cifar_stem,
        mean=o.numbers(a.mean, "--mean") or statistics[0],
        std=o.numbers(a.std, "--std") or statistics[1],
    )
    return None, {}, replace(spec, input_size=splits.input_size), splits
