"""What commands open before they work: processes, devices, models and data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust_prune.cli.output import Output
from robust_prune.errors import UsageError
from robust_prune.options import DataOptions, ModelOptions, RunOptions, ThreatOptions
from robust_prune.types import ThreatModel, parse_eps

if TYPE_CHECKING:
    from torch import nn

    from robust_prune.data import DataSplits
    from robust_prune.distributed import Processes

ModelPath = Annotated[
    str,
    typer.Argument(help="A model file, a Hugging Face folder, or a timm name.", metavar="MODEL"),
]


def threat_model(options: ThreatOptions, record: Mapping[str, Any] | None = None) -> ThreatModel:
    """Take --norm and --eps, else the threat model in the file's record, else Linf 8/255."""
    recorded = (record or {}).get("threat") or {}
    norm, eps = options.norm or recorded.get("norm") or "linf", options.eps
    if eps is None:
        eps = recorded["eps"] if recorded.get("norm") == norm else {"l2": "0.5"}.get(norm, "8/255")
    return ThreatModel(norm, parse_eps(eps))


def file_to_write(path: Path, force: bool) -> Path:
    """Return the path of --out, where a file may be written there."""
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder; name a file")
    if path.exists() and not force:
        raise UsageError(f"{path} exists; name another file with --out, or --force overwrites it")
    if not path.parent.is_dir():
        raise UsageError(f"--out {path}: there is no folder {path.parent}")
    return path


def writes() -> bool:
    """Whether this process is the one that writes, by what its launcher told it."""
    return os.environ.get("RANK", "0") == "0"


def all_processes(options: RunOptions) -> Processes:
    """Return the processes this one was started among."""
    from robust_prune import distributed

    return distributed.processes(cpu=options.device == "cpu")


def pick_device(options: RunOptions) -> str:
    """Return the device; `auto` takes a GPU where there is one, each process its own."""
    import torch

    own = all_processes(options).device
    if own is not None:
        return str(own)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here; use --device cpu")
    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return options.device


def open_model(
    path: str, options: ModelOptions, device: str = "cpu", output: Output | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Open a model with its record; what had to be assumed is noted on `output`."""
    from robust_prune import opening

    model, record = opening.open_model(path, device=device, **_values(options))
    if output is not None:
        for line in record.get("assumed", ()):
            output.note(line)
    return model, record


def assumed_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what had to be assumed of a file, as an entry of a document; none where nothing."""
    return {"assumed": record["assumed"]} if "assumed" in record else {}


def open_splits(
    model: nn.Module,
    record: Mapping[str, Any],
    options: DataOptions,
    input_size: tuple[int, int, int] | None = None,
) -> DataSplits | None:
    """Open --calibration or --data, else what the model's record names; None where none is there.

    Images have the size that the model is known to take, else --input-size, else their own.
    """
    from robust_prune.data import check_class_order, open_data, open_pictures
    from robust_prune.errors import DataError
    from robust_prune.modules import ImageModel, image_channels

    if options.calibration is not None:
        if options.data is not None:
            raise UsageError("--calibration is for want of --data; leave one of them out")
        return open_pictures(
            options.calibration,
            model,
            input_size=input_size,
            workers=options.workers,
            skip_unreadable=options.skip_unreadable,
        )
    recorded = record.get("data") or {}
    spec, root = options.data, options.data_root
    if spec == "none" or (spec is None and not recorded):
        return None
    if spec is None and root is None and "data_root" in recorded:
        root = Path(recorded["data_root"])
    try:
        splits = open_data(
            spec or recorded["data"],
            input_size=model.spec.input_size if isinstance(model, ImageModel) else input_size,
            channels=image_channels(model),
            data_root=root,
            download=options.download,
            workers=options.workers,
            skip_unreadable=options.skip_unreadable,
            split_seed=int(recorded.get("split_seed", 0)),
        )
        return check_class_order(splits, recorded) if record else splits
    except DataError as error:
        if spec is not None:
            raise
        raise DataError(
            f"the model records its data as {recorded.get('data')!r}, but {error}; name it with "
            "--data, or calibrate without data by --data none"
        ) from None


def _values(options: Any) -> dict[str, Any]:
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
