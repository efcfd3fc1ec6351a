"""`robust-prune export`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from robust_prune.cli.export_int8 import export_int8
from robust_prune.cli.opening import ModelPath, assumed_of, file_to_write, open_model
from robust_prune.cli.output import Output
from robust_prune.cli.spreading import takes_options
from robust_prune.errors import UsageError
from robust_prune.options import DataOptions, ModelOptions, QuantisingOptions, ThreatOptions


class ExportFormat(str, enum.Enum):
    """What to write."""

    onnx = "onnx"
    torch_export = "torch-export"
    hub = "hub"


Format = Annotated[
    ExportFormat,
    typer.Option(
        "--format",
        help="onnx needs the extra robust-prune\\[export]; hub is a folder for publishing.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="What to write; default NAME.onnx, NAME-int8.onnx, NAME.pt2 or the folder NAME-hub "
        "here."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]


@takes_options()
def export(
    model: ModelPath,
    to: Format,
    opening: ModelOptions,
    quantising: QuantisingOptions,
    data: DataOptions,
    threat: ThreatOptions,
    output: Output,
    out: Out = None,
    force: Force = False,
) -> None:
    """Write a model for use without this package, or as a folder to publish.

    Files take images in [0, 1] and give logits, for any batch size, and are checked against the
    module before they get their names. The folder has weights, configuration and a model card.

    --int8 quantises an ONNX file and measures it: size, time, clean and robust accuracy.
    """
    if quantising.int8:
        if to is not ExportFormat.onnx:
            raise UsageError(f"--int8 is for --format onnx, not {to.value}")
        export_int8(model, opening, quantising, data, threat, output, out, force)
    elif to is ExportFormat.hub:
        _export_folder(model, opening, output, out, force)
    else:
        _export_file(model, to.value, opening, output, out, force)


def _export_file(
    model: str, to: Any, opening: ModelOptions, output: Output, out: Path | None, force: bool
) -> None:
    from robust_prune import exporting
    from robust_prune.models import image_size_of
    from robust_prune.types import to_plain

    path = file_to_write(out or Path(Path(model).stem + exporting.SUFFIXES[to]), force)
    module, record = open_model(model, opening, output=output)
    size = image_size_of(module, opening.input_size)
    done = exporting.export(module, path, to=to, input_size=size)
    shape = "x".join(map(str, size))
    output.result(f"wrote {done.path}: images [N, {shape}] in [0, 1], float32, to logits")
    if done.error is None:
        output.note("not checked: onnxruntime is not installed")
    else:
        output.result(
            f"checked on batches of {', '.join(map(str, done.batches))}: logits differ from the "
            f"module's by {done.error:.1e} of the largest"
        )
    told = {"path": str(path), "input_size": size, **assumed_of(record)}
    output.document({**to_plain(done), **told})


def _export_folder(
    model: str, opening: ModelOptions, output: Output, out: Path | None, force: bool
) -> None:
    from robust_prune import hub, models

    folder = out or Path(f"{Path(model).stem}-hub")
    if folder.is_file():
        raise UsageError(f"--out {folder} is a file; name a folder")
    if (folder / models.CONFIG).exists() and not force:
        raise UsageError(f"{folder} holds a model; name another folder, or --force overwrites it")
    module, record = open_model(model, opening, output=output)
    hub.save_pretrained(module, folder, record)
    output.result(f"wrote {folder}: model.safetensors, config.json, README.md, model_info.json")
    output.line(f"read the card, then: hf upload OWNER/NAME {folder}")
    output.document({"format": "hub", "path": str(folder)})
