"""What benchmarks of a few long runs share: the log that they write, and the network given."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from robust_prune.models import library_versions
from robust_prune.pipeline import hardware

NETWORK: dict[str, Any] = {  # of cifar10-resnet10-robust.pt, a plain state_dict
    "arch": "resnet18",
    "model_kwargs": {
        "layers": [1, 1, 1, 1],
        "channels": [16, 32, 64, 128],
        "stem_type": "deep",
        "stem_width": 8,
    },
    "cifar_stem": True,
}


@contextmanager
def log_of(
    out: Path, *, threads: int = 1, mode: str = "a", **settings: Any
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give what writes lines of OUT/runs.jsonl; the first has settings, versions and hardware.

    Args:
        out: folder of the record, made if it is not there.
        threads: of torch, from here on.
        mode: "a" to add to earlier runs, "w" to replace them.
        settings: what the first line starts with.
    """
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "runs.jsonl").open(mode, encoding="utf-8") as log:

        def write(line: dict[str, Any]) -> None:
            print(json.dumps(line), file=log, flush=True)

        told = {**settings, "threads": threads, "versions": library_versions()}
        write({**told, **hardware(torch.device("cpu"))})
        yield write
