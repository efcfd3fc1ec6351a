"""`robust-prune export`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from robust_prune.cli.opening import ModelPath, open_model
from robust_prune.cli.output import Output
from robust_prune.cli.spreading import takes_options
from robust_prune.errors import UsageError
from robust_prune.options import ModelOptions


class ExportFormat(str, enum.Enum):
    """What to write."""

    onnx = "onnx"
    torch_export = "torch-export"


Format = Annotated[
    ExportFormat, typer.Option("--format", help="onnx needs the extra robust-prune[export].")
]
Out = Annotated[
    Path | None, typer.Option(help="File to write; default NAME.onnx or NAME.pt2 here.")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite a file.")]


@takes_options()
def export(
    model: ModelPath,
    to: Format,
    opening: ModelOptions,
    output: Output,
    out: Out = None,
    force: Force = False,
) -> None:
    """Write a model for use without this package: images in [0, 1] in, logits out, any batch size.

    The file is checked against the module before it gets its name.
    """
    from robust_prune import exporting
    from robust_prune.models import image_size_of
    from robust_prune.types import to_plain

    path = out or Path(Path(model).stem + exporting.SUFFIXES[to.value])
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder; name a file")
    if path.exists() and not force:
        raise UsageError(f"{path} exists; name another file with --out, or --force overwrites it")
    if not path.parent.is_dir():
        raise UsageError(f"--out {path}: there is no folder {path.parent}")
    module, _ = open_model(model, opening)
    size = image_size_of(module, opening.input_size)
    done = exporting.export(module, path, to=to.value, input_size=size)
    shape = "x".join(map(str, size))
    output.result(f"wrote {done.path}: images [N, {shape}] in [0, 1], float32, to logits")
    if done.error is None:
        output.note("not checked: onnxruntime is not installed")
    else:
        output.result(
            f"checked on batches of {', '.join(map(str, done.batches))}: logits differ from the "
            f"module's by {done.error:.1e} of the largest"
        )
    output.document({**to_plain(done), "path": str(path), "input_size": size})
