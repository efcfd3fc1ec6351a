"""`robust-prune train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust_prune.cli.opening import (
    all_processes,
    open_model,
    open_splits,
    pick_device,
    threat_model,
)
from robust_prune.cli.output import Output
from robust_prune.cli.resuming import Resuming
from robust_prune.cli.spreading import takes_options
from robust_prune.errors import Interrupted, UsageError
from robust_prune.options import (
    DataOptions,
    ModelOptions,
    NewOutputOptions,
    NewTrainingOptions,
    RunOptions,
    ThreatOptions,
    chosen,
)
from robust_prune.types import ThreatModel

if TYPE_CHECKING:
    from torch import nn

    from robust_prune.data import DataSplits
    from robust_prune.pipeline import TrainResult
    from robust_prune.types import ModelSpec

Start = Annotated[
    str | None,
    typer.Option("--from", help="Model file to go on from.", rich_help_panel=ModelOptions.panel),
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Start from timm's weights.")]


@takes_options(resuming=Resuming(lambda folder: folder, method="method"))
def train(
    training: NewTrainingOptions,
    threat: ThreatOptions,
    writing: NewOutputOptions,
    opening: ModelOptions,
    data: DataOptions,
    running: RunOptions,
    output: Output,
    arguments: dict[str, Any],
    start: Start = None,
    pretrained: Pretrained = False,
) -> None:
    """Train a network adversarially; the last epoch is kept that is not less robust than others.

    The run's state is kept beside the file, in NAME.run/, until it is complete: --resume NAME.run
    goes on.
    """
    if (opening.arch is None) == (start is None):
        raise UsageError("say what to train: --arch NAME for a new network, or --from FILE")
    if data.data in (None, "none") and start is None:
        raise UsageError("training needs data: --data cifar10, digits, or an image folder")

    from robust_prune.cli.progress import training_shown
    from robust_prune.finetune import TrainingConfig
    from robust_prune.pipeline import Events, train_file

    _check_teacher(training)
    threat_model(threat)  # what is typed is checked before anything is opened
    processes = all_processes(running)
    output = output.only_on(processes.first)
    target = processes.on_first(lambda: _target(writing, opening.arch, start))
    device = pick_device(running)
    model, record, spec, splits = _model_and_data(start, opening, data, device, output, pretrained)
    attacker = threat_model(threat, record)
    config = TrainingConfig(**chosen(TrainingConfig, training, running), threat=attacker)
    teacher = None
    if training.teacher is not None:
        teacher, _ = open_model(training.teacher, ModelOptions(), device)
    output.line(
        f"{spec.arch}: {config.method}, {config.epochs} epochs, {attacker}, {len(splits.train)} "
        f"training and {len(splits.validation or ())} validation images of {splits.name}, seed "
        f"{config.seed}"
    )
    with training_shown(output, writing, target.parent, arguments) as shown:
        result = train_file(
            spec,
            splits,
            config,
            target,
            Events(note=output.note, training=shown.on_progress, epoch=shown.on_epoch),
            arguments=arguments,
            resume=writing.resume is not None,
            device=device,
            pretrained=pretrained,
            start=model,
            teacher=teacher,
            processes=processes,
        )
    _tell(output, result, target, arguments)


def _check_teacher(training: NewTrainingOptions) -> None:
    """Raise where a teacher is given to a method that does not learn from one."""
    from robust_prune.finetune import needs_teacher, resolve_method

    learns = needs_teacher(resolve_method(training.method)[1])
    if training.teacher is not None and not learns:
        raise UsageError(
            f"--teacher: {training.method} does not learn from a model; rslad and ard do"
        )


def _tell(output: Output, result: TrainResult, target: Path, arguments: dict[str, Any]) -> None:
    """Print which epoch was written, and how a run that was stopped goes on."""
    from robust_prune.pipeline import go_on_text

    history, threat = result.history, ThreatModel(**result.record["threat"])
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


def _target(writing: NewOutputOptions, arch: str | None, start: str | None) -> Path:
    """Return the file to write, if it may be written."""
    if writing.resume is not None:
        folder = writing.resume.resolve()
        if folder.suffix != ".run":
            raise UsageError(
                f"--resume {writing.resume}: the folder of a training run is named NAME.run"
            )
        return folder.with_suffix("")
    stem = Path(str(start)).stem if arch is None else arch.replace("/", "-")
    target = writing.out or Path(f"{stem}-trained.safetensors")
    if not target.parent.is_dir():
        raise UsageError(f"--out {target}: there is no folder {target.parent}")
    if writing.force:
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
    start: str | None,
    opening: ModelOptions,
    data: DataOptions,
    device: str,
    output: Output,
    pretrained: bool,
) -> tuple[nn.Module | None, dict[str, Any], ModelSpec, DataSplits]:
    """Return the model to start from and its record, how to build it, and the data.

    A new one is None, with an empty record.
    """
    from robust_prune.data import open_data
    from robust_prune.models import resolve_spec
    from robust_prune.modules import ImageModel

    if start is not None:
        model, record = open_model(start, opening, device, output)
        found = open_splits(model, record, data)
        if found is None:
            raise UsageError(f"{start} records no data; name it with --data")
        if not isinstance(model, ImageModel):
            raise UsageError(
                f"{start} is of a class that only Python code can build; train it there"
            )
        return model, record, replace(model.spec, input_size=found.input_size), found
    kwargs = dict(opening.model_kwargs or {})
    splits = open_data(
        str(data.data),
        input_size=opening.input_size,
        channels=kwargs.get("in_chans"),
        data_root=data.data_root,
        download=data.download,
        workers=data.workers,
        skip_unreadable=data.skip_unreadable,
    )
    channels = splits.input_size[0]
    kwargs = {"num_classes": splits.classes, **kwargs}
    if channels != 3:
        kwargs.setdefault("in_chans", channels)
    statistics = (None, None) if pretrained else splits.statistics()
    spec = resolve_spec(
        str(opening.arch),
        kwargs,
        cifar_stem=opening.cifar_stem,
        mean=opening.mean or statistics[0],
        std=opening.std or statistics[1],
    )
    return None, {}, replace(spec, input_size=splits.input_size), splits
