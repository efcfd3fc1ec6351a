"""`robust-prune compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust_prune.cli.opening import open_model, open_splits, pick_device, threat_model
from robust_prune.cli.output import Output
from robust_prune.cli.spreading import takes_options
from robust_prune.errors import DataError, ModelError, UsageError
from robust_prune.options import (
    AUTO,
    ComparingOptions,
    DataOptions,
    LatencyOptions,
    ModelOptions,
    RunOptions,
    ThreatOptions,
)

if TYPE_CHECKING:
    from torch import nn

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
Models = Annotated[
    list[str],
    typer.Argument(
        help="Model files, Hugging Face folders, timm names, or folders that compress wrote; the "
        "others are tested against the first.",
        metavar="MODEL...",
    ),
]
Out = Annotated[Path, typer.Option(help="Folder to write compare.json and compare.html into.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]


@takes_options()
def compare(
    models: Models,
    comparing: ComparingOptions,
    timing: LatencyOptions,
    threat: ThreatOptions,
    opening: ModelOptions,
    data: DataOptions,
    running: RunOptions,
    output: Output,
    out: Out = Path("comparison"),
    force: Force = False,
) -> None:
    """Measure several models on the same images: accuracy, security curve, cost, time, examples.

    Options of a model (--arch and the like) are for files that don't say what they are.
    """
    threat_model(threat)  # what is typed is checked before anything is opened
    names = _names(models)
    page, document = out / "compare.html", out / "compare.json"
    _check_out(out, document, force)

    from robust_prune import comparing as room
    from robust_prune import report
    from robust_prune.files import write_text
    from robust_prune.pipeline import eval_images
    from robust_prune.types import to_plain

    device = pick_device(running)
    opened = {name: _open(path, opening, device) for name, path in names.items()}
    nets = {name: module for name, (module, _) in opened.items()}
    records = {name: record for name, (_, record) in opened.items()}
    first, known = next(iter(nets.values())), next((r for r in records.values() if r), {})
    splits = open_splits(first, known, data, opening.input_size)
    if splits is None or splits.test is None or not splits.labelled:
        raise UsageError("compare needs labelled test images; name them with --data")
    _check_classes(nets, splits.classes)
    found = room.compare(
        nets,
        splits,
        threat=threat_model(threat, known),
        attack=comparing.evaluation,
        n="auto" if comparing.n_eval == AUTO else eval_images(comparing.n_eval, device),
        margin=comparing.margin,
        seed=running.seed,
        batches=room.BATCHES if comparing.batches is None else comparing.batches,
        timing=timing,
        records=records,
        data_name=splits.name,
        class_names=splits.source.get("class_names"),
        on_progress=lambda line: output.line(f"  {line}"),
    )
    _show(output, found)
    out.mkdir(parents=True, exist_ok=True)
    plain = to_plain(found)
    write_text(document, report.to_json(plain))
    write_text(page, report.to_comparison_html(plain))
    for path in (document, page):
        output.result(f"wrote {path}")
    output.document({"files": {"json": str(document), "html": str(page)}, "comparison": plain})


def _show(output: Output, found: Mapping[str, Any]) -> None:
    """Print accuracy, cost and notes."""
    from robust_prune import report

    for table in (report.accuracy_by_model(found), report.cost_by_model(found)):
        output.table(
            f"{table.label}: {report.comparison_line(found)}"
            if table.label.startswith("Accuracy")
            else "; ".join(filter(None, (table.label, found["timed"]))),
            table.head,
            table.rows,
        )
    for note in found["notes"]:
        output.note(note)


def _names(models: Sequence[str]) -> dict[str, str]:
    """Return what to open by the names that models are shown with, each its own."""
    from robust_prune.files import is_there

    if len(models) < 2:
        raise UsageError("name two models or more to compare")
    found: dict[str, str] = {}
    for model in models:
        path = _inside(Path(model))
        named = Path(model)
        name = named.stem if named.suffix in SUFFIXES else named.name or Path.cwd().name
        if name in found and path.parent.name:
            name = f"{path.parent.name}/{name}"
        if name in found:
            raise UsageError(f"{model} is named twice")
        found[name] = str(path) if is_there(path) else model
    return found


def _inside(path: Path) -> Path:
    """Return the model of a folder that compress wrote; any other path as it is."""
    from robust_prune.files import is_there

    if not is_there(path / "report.json"):
        return path
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ModelError(f"{path}: holds {len(files)} model files; name the one to compare")
    return files[0]


def _open(path: str, opening: ModelOptions, device: str) -> tuple[nn.Module, Mapping[str, Any]]:
    """Open a model, and check what its record says of its plan."""
    from robust_prune import report

    module, record = open_model(path, opening, device)
    if "plan" in record:
        try:
            report.check_record(record)
        except ValueError as error:
            raise ModelError(f"{path}: its report is malformed: {error}") from None
    return module, record


def _check_classes(nets: Mapping[str, nn.Module], classes: int) -> None:
    from robust_prune.modules import ImageModel

    for name, net in nets.items():
        outputs = net.spec.num_classes if isinstance(net, ImageModel) else 0
        if classes and outputs and outputs < classes:
            raise DataError(f"{name} has {outputs} outputs, the data {classes} classes")


def _check_out(out: Path, document: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    if document.exists() and not force:
        raise UsageError(
            f"{document} exists; name another folder with --out, or --force overwrites it"
        )
