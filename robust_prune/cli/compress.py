"""`robust-prune compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust_prune.cli import options as o
from robust_prune.cli.output import Output, duration
from robust_prune.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from robust_prune.data import DataSplits
    from robust_prune.settings import Settings

PRUNING, TRAINING, OUTPUT = "Pruning", "Fine-tuning and evaluation", "Output"
DEFAULT_EPOCHS = 3


def compress(
    model: o.ModelPath,
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
    finetune: Annotated[
        str | None,
        typer.Option(
            help="trades, pgd-at, n-fgsm, package.module:function, or none. Default: "
            "trades where data is known.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help=f"Of fine-tuning; default {DEFAULT_EPOCHS}.", min=0, rich_help_panel=TRAINING
        ),
    ] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=TRAINING)] = 0.02,
    batch_size: Annotated[
        int, typer.Option(help="Images at a time.", min=2, rich_help_panel=TRAINING)
    ] = 128,
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
        typer.Option("--force", help="Overwrite a finished result.", rich_help_panel=OUTPUT),
    ] = False,
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

    Writes NAME-pruned.safetensors, report.json and report.html into NAME-pruned/.

    The model is written once it is pruned and completed later: Ctrl-C leaves it usable.
    """
    output = Output(as_json=as_json, quiet=quiet)
    name = f"{_stem(model)}-pruned"
    folder = out or Path(name)
    _refuse_overwrite(folder / f"{name}.safetensors", folder, force)
    replayed = None if plan is None else _read_plan(plan)
    if ratio is not None and replayed is not None:
        raise UsageError("--plan brings its own budget; leave out --ratio, or the plan")
    if ratio is None and replayed is None:
        raise UsageError("say how much to remove: --ratio 0.5 removes half of the multiply-adds")

    from robust_prune import pipeline
    from robust_prune.settings import Events, Settings
    from robust_prune.types import Budget

    module, record = o.open_model(
        model, arch, model_kwargs, cifar_stem, mean, std, input_size, trust_pickle, device
    )
    splits = o.open_splits(module, record, data, data_root, download, workers)
    tuned = _finetuning(finetune, epochs, quick, splits)
    chosen = _evaluation(eval_, quick, splits)
    settings = Settings(
        budget=replayed.budget if replayed else Budget(target, ratio),  # type: ignore[arg-type]
        threat=o.threat_model(norm, eps, record),
        allocation=replayed.allocation if replayed else allocation,
        score=replayed.score if replayed else score,  # type: ignore[arg-type]
        method=mrs.value,
        finetune=tuned[0],
        epochs=tuned[1],
        lr=lr,
        batch_size=batch_size,
        protect=tuple(protect or ()),
        round_to=round_to,
        whole_heads=whole_heads,
        reconstruct=not no_reconstruct,
        verify=not no_verify,
        calibration_images=calibration_images,
        evaluation=chosen.value,
        n_eval=o.eval_images(n_eval, device),
        plan=replayed,
        input_size=o.image_size(input_size),
        notes=tuple(record.get("assumed", ())),
        seed=seed,
    )
    _announce(output, module, splits, settings)
    with output.training() as (on_progress, on_epoch):
        events = Events(
            stage=output.line,
            note=output.note,
            training=on_progress,
            epoch=on_epoch,
            evaluating=lambda line: output.line(f"  {line}"),
        )
        result, paths = pipeline.compress_file(module, splits, settings, folder, name, events)
    show(output, result.report)
    for path in paths.values():
        output.result(f"wrote {path}")
    output.document(
        {"files": {key: str(path) for key, path in paths.items()}, "report": result.report}
    )


def show(output: Output, record: dict[str, Any]) -> None:
    """Print the tables of a report."""
    from robust_prune import report

    plan = record["plan"]
    output.table(
        f"Cost at {'x'.join(map(str, plan['input_size']))}",
        ("", "dense", "pruned", "change"),
        report.cost_rows(record),
    )
    output.line(report.check_line(record))
    rows = report.accuracy_rows(record)
    if rows:
        has_middle = any(row["pruned_before_finetuning"] for row in rows)
        output.table(
            "Accuracy: " + report.headline(record),
            ("attack", "dense", *(["un-tuned"] if has_middle else []), "pruned", "p"),
            [
                (
                    row["name"],
                    report.percent(row["dense"]),
                    *([report.percent(row["pruned_before_finetuning"])] if has_middle else []),
                    report.percent(row["pruned"]),
                    "-" if row["p_value"] is None else f"{row['p_value']:.2g}",
                )
                for row in rows
            ],
        )
    for line in report.flags(record):
        output.note(line)


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
    from robust_prune.finetune import resolve

    resolve(method or "trades")
    epochs = DEFAULT_EPOCHS if epochs is None else epochs
    if epochs == 0:
        raise UsageError("--epochs 0 with --finetune; use --finetune none")
    return method or "trades", epochs


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
    if not force and path.exists():
        raise UsageError(f"{path} exists; name another folder with --out, or --force overwrites it")
