"""`robust-prune compress`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust_prune.cli import options as o
from robust_prune.cli.output import Output, duration
from robust_prune.cli.resuming import arguments_again, arguments_of, arguments_typed
from robust_prune.cli.tables import show_report
from robust_prune.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from robust_prune.data import DataSplits
    from robust_prune.pipeline import Settings

PRUNING, TRAINING, OUTPUT = "Pruning", o.TRAINING, "Output"
DEFAULT_METHOD, DEFAULT_EPOCHS = "pgd-at", 3


def compress(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model file, a Hugging Face folder, or a timm name; none with --resume.",
            metavar="MODEL",
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(help="Share of the target to remove, in (0, 1).", rich_help_panel=PRUNING),
    ] = None,
    target: Annotated[
        str, typer.Option(help="macs, params or channels.", rich_help_panel=PRUNING)
    ] = "macs",
    allocation: Annotated[
        str,
        typer.Option(
            help="curve (measured loss of each group, the default), mrs (the paper's rule), or the "
            "controls uniform and inverted.",
            rich_help_panel=PRUNING,
        ),
    ] = "curve",
    score: Annotated[
        str,
        typer.Option(
            help="Channel score: l2, taylor, fisher or reconstruction.", rich_help_panel=PRUNING
        ),
    ] = "l2",
    mrs: Annotated[
        o.MRSMethod, typer.Option(help="Estimator of MRS.", rich_help_panel=PRUNING)
    ] = o.MRSMethod.first_order,
    protect: Annotated[
        list[str] | None,
        typer.Option(
            help="Layer or pattern to leave whole; may be repeated.", rich_help_panel=PRUNING
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Replay the plan of a report.json or plan file.", rich_help_panel=PRUNING
        ),
    ] = None,
    calibration_images: Annotated[
        int | None,
        typer.Option(
            help="Training images to measure MRS on; default 512, fewer for large networks on a "
            "CPU.",
            min=1,
            rich_help_panel=PRUNING,
        ),
    ] = None,
    round_to: Annotated[
        int,
        typer.Option(
            help="Make widths multiples of this, as hardware likes them (8, 16).",
            min=1,
            rich_help_panel=PRUNING,
        ),
    ] = 1,
    whole_heads: Annotated[
        bool,
        typer.Option(
            "--whole-heads",
            help="Attentions lose whole heads, not the same dims of every head.",
            rich_help_panel=PRUNING,
        ),
    ] = False,
    no_reconstruct: Annotated[
        bool,
        typer.Option(
            "--no-reconstruct",
            help="Leave weights as they are instead of fitting them to the dense activations.",
            rich_help_panel=PRUNING,
        ),
    ] = False,
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify",
            help="Don't compare the pruned model with the masked dense one.",
            rich_help_panel=PRUNING,
        ),
    ] = False,
    steps: Annotated[
        int,
        typer.Option(
            help="Prune and fine-tune so often, with sensitivity measured anew each time.",
            min=1,
            rich_help_panel=PRUNING,
        ),
    ] = 1,
    finetune: Annotated[
        str | None,
        typer.Option(
            help="pgd-at, trades, mart, rslad, ard, n-fgsm, any of them with +awp, "
            f"package.module:function, or none. Default: {DEFAULT_METHOD} where data is known.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help=f"Of fine-tuning; default {DEFAULT_EPOCHS}.", min=0, rich_help_panel=TRAINING
        ),
    ] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=TRAINING)] = 0.1,
    batch_size: Annotated[
        int, typer.Option(help="Images at a time.", min=2, rich_help_panel=TRAINING)
    ] = 128,
    attack_steps: o.AttackSteps = 7,
    optimizer: o.Optimizer = "sgd",
    schedule: o.Schedule = "constant",
    ema: o.EMA = 0.999,
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
    eval_: Annotated[
        o.Eval | None,
        typer.Option(
            "--eval", help="Default: autoattack where data is known.", rich_help_panel=TRAINING
        ),
    ] = None,
    n_eval: Annotated[
        int | None,
        typer.Option(
            help="Test images; default 200, on a GPU 1,000.", min=1, rich_help_panel=TRAINING
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="No fine-tuning, PGD only.", rich_help_panel=TRAINING),
    ] = False,
    norm: o.NormOption = None,
    eps: o.Eps = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; default NAME-pruned/ here.", rich_help_panel=OUTPUT),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Overwrite what is there.", rich_help_panel=OUTPUT),
    ] = False,
    resume: o.Resume = None,
    tensorboard: o.TensorBoard = False,
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
    """Prune a model, fine-tune what is left, measure it, and write file and report.

    Writes NAME-pruned.safetensors, report.json and report.html into NAME-pruned/, and the run's
    state into NAME-pruned/run/.

    The model is written once it is pruned and completed later: Ctrl-C leaves it usable, and
    --resume NAME-pruned goes on.
    """
    arguments = arguments_of(ctx)
    if resume is not None:
        arguments = _recorded(ctx, resume)
    _compress(SimpleNamespace(**arguments_typed(arguments)), arguments, resume)


def _recorded(ctx: typer.Context, folder: Path) -> dict[str, Any]:
    """Return the arguments of the run in a result's folder."""
    from robust_prune.pipeline import RUN, RunFolder

    run = RunFolder(folder / RUN)
    arguments = run.config().get("arguments")
    if run.complete:
        raise UsageError(f"the run in {folder} is complete; there is nothing to go on with")
    return arguments_again(ctx, arguments or {}, "finetune", folder)


def _compress(a: SimpleNamespace, arguments: dict[str, Any], resume: Path | None) -> None:
    """Do what the arguments say."""
    if a.model is None:
        raise UsageError("name a model to compress, or a folder to go on with: --resume DIR")
    from robust_prune.distributed import started_among

    name = f"{_stem(a.model)}-pruned"
    folder = resume or a.out or Path(name)
    file = folder / f"{name}.safetensors"
    if resume is None and started_among() == 1:
        _refuse_overwrite(file, folder, a.force)
    replayed = None if a.plan is None else _read_plan(a.plan)
    if a.ratio is not None and replayed is not None:
        raise UsageError("--plan brings its own budget; leave out --ratio, or the plan")
    if a.ratio is None and replayed is None:
        raise UsageError("say how much to remove: --ratio 0.5 removes half of the multiply-adds")

    from robust_prune.pipeline import Events, compress_file

    processes = o.all_processes(a.device)
    if resume is None and processes.size > 1:
        # one asks for all: another might see the folder that the first has made
        processes.on_first(lambda: _refuse_overwrite(file, folder, a.force))
    output = Output(as_json=a.as_json, quiet=a.quiet, silent=not processes.first)
    module, record = o.open_model(
        a.model,
        a.arch,
        a.model_kwargs,
        a.cifar_stem,
        a.mean,
        a.std,
        a.input_size,
        a.trust_pickle,
        a.device,
    )
    splits = o.open_splits(module, record, a.data, a.data_root, a.download, a.workers, a.input_size)
    settings = _settings(a, record, splits, replayed)
    arguments = {**arguments, "n_eval": settings.n_eval}
    _announce(output, module, splits, settings)
    with output.training(folder if a.tensorboard else None) as (on_progress, on_epoch):
        events = Events(
            stage=output.line,
            note=output.note,
            training=on_progress,
            epoch=on_epoch,
            evaluating=lambda line: output.line(f"  {line}"),
        )
        result, paths = compress_file(
            module,
            splits,
            settings,
            folder,
            name,
            events,
            arguments=arguments,
            resume=resume is not None,
            processes=processes,
        )
    show_report(output, result.report)
    for path in paths.values():
        output.result(f"wrote {path}")
    output.document(
        {"files": {key: str(path) for key, path in paths.items()}, "report": result.report}
    )


def _settings(
    a: SimpleNamespace, record: dict[str, Any], splits: DataSplits | None, replayed: Any
) -> Settings:
    from robust_prune.pipeline import Settings
    from robust_prune.types import Budget

    method, epochs = _finetuning(a.finetune, a.epochs, a.quick, splits)
    return Settings(
        budget=replayed.budget if replayed else Budget(a.target, a.ratio),
        threat=o.threat_model(a.norm, a.eps, record),
        allocation=replayed.allocation if replayed else a.allocation,
        score=replayed.score if replayed else a.score,
        method=a.mrs.value,
        finetune=method,
        epochs=epochs,
        lr=a.lr,
        attack_steps=a.attack_steps,
        training_options={name: getattr(a, name) for name in o.TRAINING_OPTIONS},
        steps=a.steps,
        batch_size=a.batch_size,
        protect=tuple(a.protect or ()),
        round_to=a.round_to,
        whole_heads=a.whole_heads,
        reconstruct=not a.no_reconstruct,
        verify=not a.no_verify,
        calibration_images=a.calibration_images,
        evaluation=_evaluation(a.eval_, a.quick, splits).value,
        n_eval=o.eval_images(a.n_eval, a.device),
        plan=replayed,
        input_size=o.image_size(a.input_size),
        notes=tuple(record.get("assumed", ())),
        seed=a.seed,
    )


def _announce(
    output: Output, module: nn.Module, splits: DataSplits | None, settings: Settings
) -> None:
    """Say what will be done, and how long the evaluation will take."""
    from robust_prune import evaluation

    budget = settings.budget
    tuning = f"{settings.finetune}, {settings.epochs} epochs" if settings.finetune else "none"
    output.line(
        f"remove {100 * budget.prune_ratio:g} % of the {budget.target}; allocation "
        f"{settings.allocation}, score {settings.score}, MRS {settings.method}; threat "
        f"{settings.threat}; fine-tuning {tuning}; seed {settings.seed}"
    )
    if splits is None:
        return
    output.line(
        f"data {splits.name}: {len(splits.train)} training, {len(splits.validation or ())} "
        f"validation, {len(splits.test or ())} test images, {splits.classes} classes"
    )
    if settings.evaluation == "autoattack" and splits.test is not None:
        n = min(settings.n_eval, len(splits.test))
        images, _ = splits.test.take(min(64, n), 0)
        # the pruned model runs faster than the dense one by about its share of the cost
        one = evaluation.autoattack_seconds(module, images, splits.classes, 0.35) * n / len(images)
        total = one * (2 - 0.7 * settings.budget.prune_ratio)
        output.line(
            f"AutoAttack on {n} test images, dense and pruned, at the end: about {duration(total)}"
        )


def _finetuning(
    method: str | None, epochs: int | None, quick: bool, splits: DataSplits | None
) -> tuple[str | None, int]:
    if quick and method not in (None, "none"):
        raise UsageError("--quick means no fine-tuning; leave out --quick or --finetune")
    if method == "none" or quick or (method is None and (splits is None or epochs == 0)):
        if epochs:
            raise UsageError(f"--epochs {epochs} without fine-tuning; leave one of them out")
        return None, 0
    if splits is None:
        raise UsageError("--finetune needs data; name it with --data")
    from robust_prune.finetune import resolve_method

    resolve_method(method or DEFAULT_METHOD)
    epochs = DEFAULT_EPOCHS if epochs is None else epochs
    if epochs == 0:
        raise UsageError("--epochs 0 with --finetune; use --finetune none")
    return method or DEFAULT_METHOD, epochs


def _evaluation(chosen: o.Eval | None, quick: bool, splits: DataSplits | None) -> o.Eval:
    if splits is None:
        if chosen not in (None, o.Eval.none):
            raise UsageError(f"--eval {chosen.value} needs data; name it with --data")
        return o.Eval.none
    return chosen or (o.Eval.pgd if quick else o.Eval.autoattack)


def _read_plan(path: Path) -> Any:
    import json

    from robust_prune.errors import PlanError
    from robust_prune.types import PruningPlan

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"{path}: no such plan or report") from None
    except OSError as error:
        raise PlanError(f"{path}: can't be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: not JSON: {error}") from None
    return PruningPlan.from_plain(data.get("plan", data) if isinstance(data, dict) else data)


def _stem(model: str) -> str:
    """The model's name without its folder and, where it is a file's, its suffix."""
    path = Path(model)
    return path.stem if path.suffix in (".safetensors", ".pt", ".pth", ".bin") else path.name


def _refuse_overwrite(path: Path, folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file; name a folder")
    if force:
        return
    state = folder / "run"
    if (state / "config.json").exists() and not (state / "complete.json").exists():
        raise UsageError(
            f"{folder} holds a run that is not complete; --resume {folder} goes on with it, "
            "--force starts anew"
        )
    if path.exists():
        raise UsageError(f"{path} exists; name another folder with --out, or --force overwrites it")
