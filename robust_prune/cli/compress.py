"""`robust-prune compress`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust_prune.cli.budgets import check_budget, read_plan
from robust_prune.cli.opening import (
    all_processes,
    open_model,
    open_splits,
    pick_device,
    threat_model,
)
from robust_prune.cli.output import Output, duration
from robust_prune.cli.resuming import Resuming
from robust_prune.cli.spreading import takes_options
from robust_prune.cli.tables import show_report
from robust_prune.errors import UsageError
from robust_prune.options import (
    AUTO,
    FINE_TUNING_EPOCHS,
    FINE_TUNING_METHOD,
    BudgetOptions,
    DataOptions,
    EvaluationOptions,
    FineTuningOptions,
    LatencyOptions,
    ModelOptions,
    OutputOptions,
    PlanningOptions,
    RunOptions,
    ThreatOptions,
    chosen,
)

if TYPE_CHECKING:
    from torch import nn

    from robust_prune.data import DataSplits
    from robust_prune.distributed import Processes
    from robust_prune.finetune import EpochRecord, Progress
    from robust_prune.pipeline import Events, Settings
    from robust_prune.types import PruningPlan

RUN = "run"  # where a result's folder keeps the state of the run
Model = Annotated[
    str | None,
    typer.Argument(
        help="A model file, a Hugging Face folder, or a timm name; none with --resume.",
        metavar="MODEL",
    ),
]
Plan = Annotated[
    Path | None,
    typer.Option(
        help="Replay the plan of a report.json or plan file.",
        rich_help_panel=PlanningOptions.panel,
    ),
]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick", help="No fine-tuning, PGD only.", rich_help_panel=EvaluationOptions.panel
    ),
]


@takes_options(resuming=Resuming(lambda folder: folder / RUN, method="finetune"))
def compress(
    budget: BudgetOptions,
    planning: PlanningOptions,
    timing: LatencyOptions,
    finetuning: FineTuningOptions,
    evaluation: EvaluationOptions,
    threat: ThreatOptions,
    writing: OutputOptions,
    opening: ModelOptions,
    data: DataOptions,
    running: RunOptions,
    output: Output,
    arguments: dict[str, Any],
    model: Model = None,
    plan: Plan = None,
    quick: Quick = False,
) -> None:
    """Prune a model, fine-tune what is left, measure it, and write file and report.

    Writes NAME-pruned.safetensors, report.json and report.html into NAME-pruned/, and the run's
    state into NAME-pruned/run/.

    The model is written once it is pruned and completed later: Ctrl-C leaves it usable, and
    --resume NAME-pruned goes on.
    """
    if model is None:
        raise UsageError("name a model to compress, or a folder to go on with: --resume DIR")
    name = f"{_stem(model)}-pruned"
    folder = writing.resume or writing.out or Path(name)
    replayed = None if plan is None else read_plan(plan)
    check_budget(arguments["prune_ratio"], budget.max_drop, replayed)
    processes = _first_may_write(folder / f"{name}.safetensors", writing, running)

    from robust_prune.cli.progress import training_shown
    from robust_prune.pipeline import compress_file, learning_rate

    output, device = output.only_on(processes.first), pick_device(running)
    module, record = open_model(model, opening, device)
    splits = open_splits(module, record, data, opening.input_size)
    settings = _settings(
        budget,
        planning,
        timing,
        replace(_finetuning(finetuning, quick, splits), lr=learning_rate(finetuning.lr, module)),
        _evaluation(evaluation, quick, splits, device),
        threat=threat_model(threat, record),
        plan=replayed,
        input_size=opening.input_size,
        notes=tuple(record.get("assumed", ())),
        seed=running.seed,
    )
    _announce(output, module, splits, settings)
    with training_shown(output, writing, folder, arguments) as shown:
        result, paths = compress_file(
            module,
            splits,
            settings,
            folder,
            name,
            _events(output, shown.on_progress, shown.on_epoch),
            arguments={
                **arguments,
                "n_eval": "auto" if settings.n_eval == AUTO else str(settings.n_eval),
            },
            resume=writing.resume is not None,
            processes=processes,
        )
        shown.on_result(result.report)
    show_report(output, result.report)
    for path in paths.values():
        output.result(f"wrote {path}")
    files = {key: str(path) for key, path in paths.items()}
    output.document({"files": files, "report": result.report})


def _first_may_write(file: Path, writing: OutputOptions, running: RunOptions) -> Processes:
    """Return the processes, where the first of them may write the file."""
    from robust_prune.distributed import started_among

    alone = started_among() == 1
    if writing.resume is None and alone:  # before torch is asked for devices
        _refuse_overwrite(file, writing.force)
    processes = all_processes(running)
    if writing.resume is None and not alone:
        # one asks for all: another might see the folder that the first has made
        processes.on_first(lambda: _refuse_overwrite(file, writing.force))
    return processes


def _events(
    output: Output,
    on_progress: Callable[[Progress], None],
    on_epoch: Callable[[EpochRecord], None],
) -> Events:
    from robust_prune.pipeline import Events

    return Events(
        stage=output.line,
        note=output.note,
        training=on_progress,
        epoch=on_epoch,
        evaluating=lambda line: output.line(f"  {line}"),
    )


def _settings(
    budget: BudgetOptions,
    planning: PlanningOptions,
    timing: LatencyOptions,
    finetuning: FineTuningOptions,
    evaluation: EvaluationOptions,
    *,
    plan: PruningPlan | None,
    **more: Any,
) -> Settings:
    from robust_prune.pipeline import Settings, budget_of

    if plan is not None:
        planning = replace(planning, allocation=plan.allocation, score=plan.score)
    return Settings(
        **chosen(Settings, planning, timing, finetuning, evaluation),
        **(budget_of(budget) if plan is None else {"budget": plan.budget}),
        plan=plan,
        **more,
    )


def _announce(
    output: Output, module: nn.Module, splits: DataSplits | None, settings: Settings
) -> None:
    """Say what will be done, and how long the evaluation will take."""
    from robust_prune import evaluation

    budget = settings.budget
    tuning = f"{settings.finetune}, {settings.epochs} epochs" if settings.finetune else "none"
    target = "time" if settings.latency else budget.target
    if settings.max_drop is None:
        budgets = ((target, budget), *((b.target, b) for b in settings.also_budgets))
        asked = ", ".join(f"{100 * b.prune_ratio:g} % of the {what}" for what, b in budgets)
    else:
        asked = (
            f"as much of the {target} as costs "
            f"{settings.max_drop:g} percentage points of robust accuracy "
            f"({settings.max_drop_of} models)"
        )
    output.line(
        f"remove {asked}; allocation "
        f"{settings.allocation}, score {settings.score}, MRS {settings.estimator}; threat "
        f"{settings.threat}; fine-tuning {tuning}; seed {settings.seed}"
    )
    if splits is None:
        return
    output.line(
        f"{'data' if splits.labelled else splits.origin} {splits.name}: {len(splits.train)} "
        f"training, {len(splits.validation or ())} validation, {len(splits.test or ())} test "
        f"images, {splits.classes or 'unknown'} classes"
    )
    if settings.evaluation == "autoattack" and splits.test is not None:
        n = min(settings.n_eval or evaluation.FIRST, len(splits.test))
        images, _ = splits.test.take(min(64, n), 0)
        # the pruned model runs faster than the dense one by about its share of the cost
        one = evaluation.autoattack_seconds(module, images, splits.classes, 0.35) * n / len(images)
        total = one * (2 - 0.7 * settings.budget.prune_ratio)
        output.line(
            f"AutoAttack on {n} test images, dense and pruned, at the end: about {duration(total)}"
            + (", and on more until the margin is met" if settings.n_eval == AUTO else "")
        )


def _finetuning(
    asked: FineTuningOptions, quick: bool, splits: DataSplits | None
) -> FineTuningOptions:
    """Return what is fine-tuned, by what was asked and what data there is."""
    method, epochs = asked.finetune, asked.epochs
    if quick and method not in (None, "none"):
        raise UsageError("--quick means no fine-tuning; leave out --quick or --finetune")
    if method not in (None, "none"):
        from robust_prune.finetune import resolve_method

        resolve_method(method)
        if epochs == 0:
            raise UsageError("--epochs 0 with --finetune; use --finetune none")
        if splits is None:
            raise UsageError("--finetune needs data; name it with --data")
    if method == "none" or quick or (method is None and (not _labelled(splits) or epochs == 0)):
        if epochs:
            raise UsageError(f"--epochs {epochs} without fine-tuning; leave one of them out")
        return replace(asked, finetune=None, epochs=0)
    epochs = FINE_TUNING_EPOCHS if epochs is None else epochs
    return replace(asked, finetune=method or FINE_TUNING_METHOD, epochs=epochs)


def _labelled(splits: DataSplits | None) -> bool:
    return splits is not None and splits.labelled


def _evaluation(
    asked: EvaluationOptions, quick: bool, splits: DataSplits | None, device: str
) -> EvaluationOptions:
    """Return how the models are judged, by what was asked and what data there is."""
    from robust_prune.pipeline import eval_images

    n = eval_images(asked.n_eval, device)
    if splits is not None and splits.test is not None:
        return replace(
            asked, evaluation=asked.evaluation or ("pgd" if quick else "autoattack"), n_eval=n
        )
    if asked.evaluation not in (None, "none"):
        missing = "data" if splits is None else "labelled test images"
        raise UsageError(f"--eval {asked.evaluation} needs {missing}; name it with --data")
    return replace(asked, evaluation="none", n_eval=n)


def _stem(model: str) -> str:
    """The model's name without its folder and, where it is a file's, its suffix."""
    path = Path(model)
    return path.stem if path.suffix in (".safetensors", ".pt", ".pth", ".bin") else path.name


def _refuse_overwrite(path: Path, force: bool) -> None:
    folder = path.parent
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
