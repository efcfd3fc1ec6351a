"""Every option of a run, stated once: name, default, range and help.

The command line, `compress` and `train`, the stored settings and the option reference of the docs
read the fields of these groups. A new option is one field here, and is read where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from robust_prune.errors import UsageError
from robust_prune.options.parsing import (
    AUTO,
    Size,
    batch_sizes,
    builder_kwargs,
    image_size,
    number_or_auto,
    numbers,
)
from robust_prune.options.planning import PlanningOptions
from robust_prune.options.stating import Options, Range, option, other_default
from robust_prune.registry import METHODS
from robust_prune.types import Norm

LARGEST_SEED = 2**63 - 1  # of torch's generators
FINE_TUNING_METHOD, FINE_TUNING_EPOCHS = "pgd-at", 3  # of the bare command, where data is known
POSITIVE = Range(0, math.inf, "low high")
TRAINING_RATE, FINE_TUNING_RATE, RATE_WITHOUT_BATCHNORM = 0.05, 0.1, 0.05

TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")

Schedule = Literal["one-cycle", "cosine", "constant"]
OnCollapse = Literal["switch", "stop", "continue"]
BatchNormMode = Literal["eval", "train"]
Judge = Literal["none", "pgd", "autoattack"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """How a file or a name becomes a module on images in [0, 1]."""

    panel = "Model"

    arch: str | None = option(None, "timm name, or torchvision/NAME, for files that don't say it.")
    model_kwargs: Mapping[str, Any] | None = option(
        None,
        """Builder arguments as JSON, e.g. '{"channels": [16, 32]}'.""",
        parse=builder_kwargs,
        metavar="JSON",
    )
    cifar_stem: bool = option(False, "Stride-1 stem without max-pool, for small images.")
    mean: tuple[float, ...] | None = option(
        None,
        "Normalisation of images in [0, 1], one number per channel: 0.49,0.48,0.45.",
        parse=numbers,
        metavar="NUMBERS",
    )
    std: tuple[float, ...] | None = option(None, "See --mean.", parse=numbers, metavar="NUMBERS")
    input_size: Size | None = option(
        None,
        "Image size as C,H,W; default: the model's or the data's own.",
        parse=image_size,
        metavar="C,H,W",
    )
    trust_pickle: bool = option(False, "Unpickle whole modules: runs code from the file.")


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Which images a run learns from and is measured on."""

    panel = "Data"

    data: str | None = option(
        None,
        "Image folder (train/ and test/ or val/), tiny-imagenet folder, cifar10, cifar100, svhn, "
        "digits, torch/NAME, hfds/NAME or wds/FOLDER as in timm, or none. Default: what the model "
        "file records.",
    )
    calibration: Path | None = option(
        None,
        "Folder of pictures without labels, in place of --data: the plan is decided on them, with "
        "the model's own verdicts for labels.",
    )
    data_root: Path | None = option(None, "Where torchvision's data sets lie.")
    download: bool = option(False, "Fetch a missing data set.")
    skip_unreadable: bool = option(False, "Leave out, and count, pictures that can't be decoded.")
    workers: int | None = option(
        None, "Processes that decode large data sets.", within=Range(low=0)
    )


@dataclass(frozen=True, kw_only=True)
class ThreatOptions(Options):
    """What the attacker may do."""

    norm: Norm | None = option(None, "linf or l2; default: the model file's, else linf.")
    eps: str | None = option(
        None, "Size of the perturbation; default: the model file's, else 8/255, l2 0.5."
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """What every computation has."""

    seed: int = option(0, "Of everything random.", within=Range(0, LARGEST_SEED))
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where to compute.")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """How adversarial training goes; the defaults are those of training from random weights."""

    panel = "Fine-tuning and evaluation"

    lr: float | None = option(None, "Peak learning rate.", words="learning rate", within=POSITIVE)
    batch_size: int = option(128, "Images at a time.", within=Range(low=2))
    attack_steps: int = option(7, "PGD steps of the training attack.", within=Range(low=1))
    optimizer: str = option("sgd", "sgd, adamw, or another of timm's.")
    schedule: Schedule = option("one-cycle", "one-cycle, cosine or constant.")
    ema: float = option(
        0.0,
        "Decay of the weights' running average, which is then kept; 0 for none.",
        within=Range(0, 1, "high", "0.999 is usual, 0 for none"),
    )
    clip_grad: float | None = option(None, "Largest norm of the gradient.", within=POSITIVE)
    label_smoothing: float = option(
        0.0, "Of cross-entropies, in [0, 1).", within=Range(0, 1, "high")
    )
    eps_warmup: int = option(0, "Epochs over which eps rises to the full.", within=Range(low=0))
    attack_batchnorm: BatchNormMode = option(
        "eval", "Statistics in training attacks: eval (running) or train (of the batch)."
    )
    cutout: int = option(0, "Side in pixels of a square set to zero.", within=Range(low=0))
    randaugment: bool = option(False, "RandAugment.")
    patience: int | None = option(
        None, "Stop after so many epochs without a better one.", within=Range(low=1)
    )
    on_collapse: OnCollapse = option(
        "switch",
        "On catastrophic overfitting of single steps: switch (to pgd-at), stop or continue.",
    )
    amp: bool | None = option(None, "Forward passes in bfloat16; default: on GPUs that have it.")
    attack_amp: bool | None = option(
        None, "Training attacks in bfloat16; default: where the device computes in it natively."
    )
    channels_last: bool = option(False, "The layout GPUs like; not on a CPU.")
    clean_epochs: int = option(0, "Epochs on clean images first.", within=Range(low=0), shown=False)
    momentum: float = option(
        0.9, "Of SGD, with Nesterov's correction.", within=Range(0, 1, "high"), shown=False
    )
    weight_decay: float = option(
        5e-4, "Of weights with two dimensions or more.", within=Range(low=0), shown=False
    )
    warmup: float = option(
        0.1,
        "Share of all steps that the linear rise of the rate takes, in [0, 1).",
        within=Range(0, 1, "high"),
        shown=False,
    )
    validation_images: int = option(
        512, "Images to select the kept epoch by.", within=Range(low=1), shown=False
    )
    augment: bool = option(True, "Random crops and flips.", shown=False)
    fold_batchnorm: bool = option(
        True, "Attacks go through a copy with batch norms folded into convolutions.", shown=False
    )


@dataclass(frozen=True, kw_only=True)
class FineTuningOptions(TrainingOptions):
    """How what is left is trained.

    Fine-tuning goes at a high, constant rate and keeps the running average of the weights. Pruned
    models need high rates to learn what they lost (Le and Hua, "Network pruning that matters", ICLR
    2021, arXiv 2105.03193); robust overfitting sets in where rates fall (Rice et al., "Overfitting
    in adversarially robust deep learning", ICML 2020, arXiv 2002.11569); the average does what a
    falling rate is for (averages in adversarial training: Gowal et al., arXiv 2010.03593). That
    they belong together after pruning is ours (`python -m benchmarks.finetuning`).
    """

    finetune: Any = option(
        None,
        f"{METHODS}, any of them with +awp, package.module:function, or none. "
        f"Default: {FINE_TUNING_METHOD} where data is known.",
        metavar="METHOD",
    )
    epochs: int | None = option(
        None, f"Of fine-tuning; default {FINE_TUNING_EPOCHS}.", within=Range(low=0)
    )
    lr: float | None = option(
        None,
        f"Peak learning rate; default {FINE_TUNING_RATE:g}, for a network without batch norm "
        f"{RATE_WITHOUT_BATCHNORM:g}.",
        words="learning rate",
        within=POSITIVE,
    )
    schedule: Schedule = other_default(TrainingOptions, "schedule", "constant")
    ema: float = other_default(TrainingOptions, "ema", 0.999)


@dataclass(frozen=True, kw_only=True)
class NewTrainingOptions(TrainingOptions):
    """How a network is trained from random weights, or on from a file."""

    method: str = option(
        "pgd-at",
        f"{METHODS}, any of them with +awp, or package.module:function; rslad and ard with "
        "--teacher.",
    )
    teacher: str | None = option(None, "Model file that rslad and ard learn from.")
    lr: float = other_default(TrainingOptions, "lr", TRAINING_RATE)
    epochs: int = option(30, "Passes over the training images.", within=Range(low=1))
    clean_epochs: int = option(2, "Epochs on clean images first.", within=Range(low=0))


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Options):
    """How the dense and the pruned model are judged."""

    panel = "Fine-tuning and evaluation"

    evaluation: Judge | None = option(
        None, "Default: autoattack where data is known.", flag="--eval"
    )
    n_eval: int | None = option(
        None,
        "Test images; default 200, on a GPU 1,000. With auto as many as --margin takes.",
        parse=number_or_auto("n eval"),
        metavar="NUMBER",
        within=Range(low=AUTO),
    )
    margin: float = option(
        2.0,
        "With --n-eval auto: 200 images and then twice as many, until the drop against the dense "
        "or first model (of one model: its accuracy) is known to so many percentage points, half "
        "of a 95 % interval.",
        within=Range(0, 50, "low"),
    )


@dataclass(frozen=True, kw_only=True)
class JudgingOptions(EvaluationOptions):
    """How one model is judged by itself."""

    evaluation: Judge = option("autoattack", "none is clean accuracy alone.", flag="--eval")


@dataclass(frozen=True, kw_only=True)
class QuantisingOptions(Options):
    """How a model is quantised, and then measured."""

    panel = "With --int8"

    int8: bool = option(
        False,
        "Static INT8 quantisation (ONNX alone), calibrated on training images and measured again.",
    )
    int8_images: int = option(512, "Training images to calibrate on.", within=Range(low=1))
    evaluation: Judge = option(
        "pgd", "How it is measured, beside the model it comes from.", flag="--eval"
    )
    n_eval: int = option(200, "Test images.", within=Range(low=1))


@dataclass(frozen=True, kw_only=True)
class ComparingOptions(EvaluationOptions):
    """How several models are measured side by side."""

    panel = "Comparison"

    evaluation: Judge = option("pgd", "Strongest attack on all models.", flag="--eval")
    batches: tuple[int, ...] | None = option(
        None,
        "Sizes of batches to time; default 1,16,64, and 0 for no timing.",
        parse=batch_sizes,
        metavar="NUMBERS",
    )


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions(Options):
    """How MRS is measured by itself."""

    estimator: str = other_default(PlanningOptions, "estimator", PlanningOptions.estimator)
    rho: float = option(0.1, "Radius relative to the weights' norm.", within=POSITIVE)
    images: int = option(512, "Training images to measure on.", within=Range(low=1))


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    """Where results go."""

    panel = "Output"

    out: Path | None = option(None, "Folder to write; default NAME-pruned/ here.")
    force: bool = option(False, "Overwrite what is there.")
    resume: Path | None = option(
        None, "Go on with the run in this folder, with the settings it was started with."
    )
    tensorboard: bool = option(
        False, "Write TensorBoard files beside the result; needs robust-prune[tensorboard]."
    )
    track: tuple[str, ...] = option(
        (),
        f"Tell {', '.join(TRACKERS)} of every epoch and of what came out; needs its package, and "
        "accelerate. May be repeated.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.track:
            if name not in TRACKERS:
                raise UsageError(f"--track {name!r} is not known; use one of {', '.join(TRACKERS)}")


@dataclass(frozen=True, kw_only=True)
class NewOutputOptions(OutputOptions):
    """Where a trained network goes."""

    out: Path | None = option(None, "File to write; default NAME-trained.safetensors.")
