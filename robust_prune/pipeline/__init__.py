"""The whole way, station by station: the only room that composes the others."""

from robust_prune.pipeline.api import RUN, compress, compress_file, run, sensitivity, train_model
from robust_prune.pipeline.record import hardware, plain_history, plain_settings
from robust_prune.pipeline.run_folder import RunFolder, StateFile, fingerprint
from robust_prune.pipeline.settings import CompressResult, Events, Settings, eval_images

__all__ = [
    "CompressResult",
    "compress",
    "Events",
    "RUN",
    "RunFolder",
    "Settings",
    "StateFile",
    "compress_file",
    "eval_images",
    "fingerprint",
    "hardware",
    "plain_history",
    "plain_settings",
    "run",
    "sensitivity",
    "train_model",
]
