"""Options that commands share."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust_prune.errors import UsageError
from robust_prune.types import ThreatModel

if TYPE_CHECKING:
    from torch import nn

    from robust_prune.data import DataSplits
    from robust_prune.distributed import Processes

MODEL, DATA, TRAINING = "Model", "Data", "Fine-tuning and evaluation"
TRAINING_OPTIONS = (
    "optimizer",
    "schedule",
    "ema",
    "clip_grad",
    "label_smoothing",
    "eps_warmup",
    "attack_batchnorm",
    "cutout",
    "randaugment",
    "patience",
    "on_collapse",
    "amp",
    "attack_amp",
    "channels_last",
)


class Device(str, Enum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Eval(str, Enum):
    """How far an evaluation goes."""

    none = "none"
    pgd = "pgd"
    autoattack = "autoattack"


class MRSMethod(str, Enum):
    """Estimators of MRS."""

    first_order = "first-order"
    ascent = "ascent"
    structural = "structural"


ModelPath = Annotated[
    str,
    typer.Argument(help="A model file, a Hugging Face folder, or a timm name.", metavar="MODEL"),
]
Arch = Annotated[
    str | None,
    typer.Option(
        help="timm name, or torchvision/NAME, for files that don't say it.", rich_help_panel=MODEL
    ),
]
ModelKwargs = Annotated[
    str | None,
    typer.Option(
        help="""Builder arguments as JSON, e.g. '{"channels": [16, 32]}'.""", rich_help_panel=MODEL
    ),
]
CifarStem = Annotated[
    bool,
    typer.Option(
        "--cifar-stem",
        help="Stride-1 stem without max-pool, for small images.",
        rich_help_panel=MODEL,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Normalisation of images in [0, 1], one number per channel: 0.49,0.48,0.45.",
        rich_help_panel=MODEL,
    ),
]
Std = Annotated[str | None, typer.Option(help="See --mean.", rich_help_panel=MODEL)]
InputSize = Annotated[
    str | None,
    typer.Option(
        help="Image size as C,H,W; default: the model's or the data's own.", rich_help_panel=MODEL
    ),
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Unpickle whole modules: runs code from the file.",
        rich_help_panel=MODEL,
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Image folder (train/ and test/ or val/), tiny-imagenet folder, cifar10, cifar100, "
        "svhn, digits, or none. Default: what the model file records.",
        rich_help_panel=DATA,
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(help="Where torchvision's data sets lie.", rich_help_panel=DATA),
]
Download = Annotated[
    bool, typer.Option("--download", help="Fetch a missing data set.", rich_help_panel=DATA)
]
Workers = Annotated[
    int | None,
    typer.Option(help="Processes that decode large data sets.", min=0, rich_help_panel=DATA),
]
NormOption = Annotated[
    str | None,
    typer.Option("--norm", help="linf or l2; default: the model file's, else linf."),
]
Eps = Annotated[
    str | None,
    typer.Option(help="Size of the perturbation; default: the model file's, else 8/255, l2 0.5."),
]
AttackSteps = Annotated[
    int, typer.Option(help="PGD steps of the training attack.", min=1, rich_help_panel=TRAINING)
]
Optimizer = Annotated[
    str, typer.Option(help="sgd, adamw, or another of timm's.", rich_help_panel=TRAINING)
]
Schedule = Annotated[
    str, typer.Option(help="one-cycle, cosine or constant.", rich_help_panel=TRAINING)
]
EMA = Annotated[
    float,
    typer.Option(
        help="Decay of the weights' running average, which is then kept; 0 for none.",
        rich_help_panel=TRAINING,
    ),
]
ClipGrad = Annotated[
    float | None, typer.Option(help="Largest norm of the gradient.", rich_help_panel=TRAINING)
]
LabelSmoothing = Annotated[
    float, typer.Option(help="Of cross-entropies, in [0, 1).", rich_help_panel=TRAINING)
]
EpsWarmup = Annotated[
    int,
    typer.Option(help="Epochs over which eps rises to the full.", rich_help_panel=TRAINING),
]
AttackBatchNorm = Annotated[
    str,
    typer.Option(
        "--attack-batchnorm",
        help="Statistics in training attacks: eval (running) or train (of the batch).",
        rich_help_panel=TRAINING,
    ),
]
Cutout = Annotated[
    int,
    typer.Option(help="Side in pixels of a square set to zero.", rich_help_panel=TRAINING),
]
RandAugment = Annotated[
    bool, typer.Option("--randaugment", help="RandAugment.", rich_help_panel=TRAINING)
]
Patience = Annotated[
    int | None,
    typer.Option(help="Stop after so many epochs without a better one.", rich_help_panel=TRAINING),
]
OnCollapse = Annotated[
    str,
    typer.Option(
        "--on-collapse",
        help="On catastrophic overfitting of single steps: switch (to pgd-at), stop or continue.",
        rich_help_panel=TRAINING,
    ),
]
AMP = Annotated[
    bool | None,
    typer.Option(
        "--amp/--no-amp",
        help="Forward passes in bfloat16; default: on GPUs that have it.",
        rich_help_panel=TRAINING,
    ),
]
AttackAMP = Annotated[
    bool | None,
    typer.Option(
        "--attack-amp/--no-attack-amp",
        help="Training attacks in bfloat16; default: where the device computes in it natively.",
        rich_help_panel=TRAINING,
    ),
]
ChannelsLast = Annotated[
    bool,
    typer.Option(
        "--channels-last", help="The layout GPUs like; not on a CPU.", rich_help_panel=TRAINING
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        help="Go on with the run in this folder, with the settings it was started with.",
        rich_help_panel="Output",
    ),
]
TensorBoard = Annotated[
    bool,
    typer.Option(
        "--tensorboard",
        help="Write TensorBoard files beside the result; needs robust-prune[tensorboard].",
        rich_help_panel="Output",
    ),
]
Seed = Annotated[int, typer.Option(help="Of everything random.", min=0)]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute.")]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON document on stdout, all else on stderr.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")]


def threat_model(
    norm: str | None, eps: str | None, record: Mapping[str, Any] | None = None
) -> ThreatModel:
    """Take --norm and --eps, else the threat model in the file's record, else Linf 8/255."""
    recorded = (record or {}).get("threat") or {}
    norm = norm or recorded.get("norm") or "linf"
    if eps is None:
        eps = recorded["eps"] if recorded.get("norm") == norm else {"l2": "0.5"}.get(norm, "8/255")
    return ThreatModel(norm, eps)  # type: ignore[arg-type]


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """Read `0.49,0.48,0.45`."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option} {text!r}: give numbers separated by commas, as 0.49,0.48,0.45"
        ) from None


def image_size(text: str | None) -> tuple[int, int, int] | None:
    """Read `3,32,32`."""
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or any(not p.strip().isdigit() or int(p) < 1 for p in parts):
        raise UsageError(f"--input-size {text!r}: give channels,height,width, as 3,32,32")
    return int(parts[0]), int(parts[1]), int(parts[2])


def builder_kwargs(text: str | None) -> dict[str, Any] | None:
    """Read --model-kwargs."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"--model-kwargs is not JSON ({error}); quote it as '{{\"channels\": [16, 32]}}'"
        ) from None
    if not isinstance(value, dict):
        raise UsageError(f"--model-kwargs must be a JSON object, not {type(value).__name__}")
    return value


def writes() -> bool:
    """Whether this process is the one that writes, by what its launcher told it."""
    return os.environ.get("RANK", "0") == "0"


def all_processes(device: Device) -> Processes:
    """Return the processes this one was started among."""
    from robust_prune import distributed

    return distributed.processes(cpu=device is Device.cpu)


def pick_device(device: Device) -> str:
    """Return the device; `auto` takes a GPU where there is one, each process its own."""
    import torch

    own = all_processes(device).device
    if own is not None:
        return str(own)

    if device is Device.cuda and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here; use --device cpu")
    if device is Device.auto:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(device.value)


def eval_images(asked: int | None, device: Device) -> int:
    """Return how many test images to measure on: what was asked, else what the device can do."""
    return asked or (1000 if pick_device(device).startswith("cuda") else 200)


def open_model(
    path: str,
    arch: str | None,
    model_kwargs: str | None,
    cifar_stem: bool,
    mean: str | None,
    std: str | None,
    input_size: str | None,
    trust_pickle: bool,
    device: Device,
) -> tuple[nn.Module, dict[str, Any]]:
    """Read the shared model options and open the model with its record."""
    from robust_prune.models import open_model

    return open_model(
        path,
        arch=arch,
        model_kwargs=builder_kwargs(model_kwargs),
        cifar_stem=cifar_stem,
        mean=numbers(mean, "--mean"),
        std=numbers(std, "--std"),
        input_size=image_size(input_size),
        trust_pickle=trust_pickle,
        device=pick_device(device),
    )


def open_splits(
    model: nn.Module,
    record: dict[str, Any],
    spec: str | None,
    data_root: Path | None,
    download: bool,
    workers: int | None,
    input_size: str | None = None,
) -> DataSplits | None:
    """Open --data, else what the model's record names; None where neither is there.

    Images have the size that the model is known to take, else --input-size, else their own.
    """
    from robust_prune.data import open_data
    from robust_prune.errors import DataError
    from robust_prune.modules import ImageModel, image_channels

    recorded = record.get("data") or {}
    if spec == "none" or (spec is None and not recorded):
        return None
    if spec is None and data_root is None and "data_root" in recorded:
        data_root = Path(recorded["data_root"])
    size = model.spec.input_size if isinstance(model, ImageModel) else image_size(input_size)
    try:
        return open_data(
            spec or recorded["data"],
            input_size=size,
            channels=image_channels(model),
            data_root=data_root,
            download=download,
            workers=workers,
            split_seed=int(recorded.get("split_seed", 0)),
        )
    except DataError as error:
        if spec is not None:
            raise
        raise DataError(
            f"the model records its data as {recorded.get('data')!r}, but {error}; name it with "
            "--data, or calibrate without data by --data none"
        ) from None
