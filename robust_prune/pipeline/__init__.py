"""The whole way, station by station: the only room that composes the others."""

from robust_prune.pipeline.api import compress, sensitivity
from robust_prune.pipeline.compress_file import RUN, compress_file
from robust_prune.pipeline.compression import run
from robust_prune.pipeline.describing import hardware, plain_settings
from robust_prune.pipeline.record import plain_history
from robust_prune.pipeline.run_folder import RunFolder, StateFile, fingerprint
from robust_prune.pipeline.settings import (
    CompressResult,
    Events,
    Settings,
    budget_of,
    eval_images,
    learning_rate,
)
from robust_prune.pipeline.train_file import (
    TrainResult,
    go_on_text,
    run_path,
    train_file,
    train_model,
)

__all__ = [
    "CompressResult",
    "compress",
    "Events",
    "RUN",
    "RunFolder",
    "Settings",
    "budget_of",
    "StateFile",
    "TrainResult",
    "compress_file",
    "eval_images",
    "learning_rate",
    "fingerprint",
    "go_on_text",
    "hardware",
    "plain_history",
    "plain_settings",
    "run",
    "run_path",
    "sensitivity",
    "train_file",
    "train_model",
]
