"""Coverage-guided fuzzing of the readers: `python -m tests.fuzz.atheris_readers SECONDS [CORPUS]`.

The first byte of an input chooses the reader, the rest is its file.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

from tests.fuzz.changing import changed

with atheris.instrument_imports(include=["robust_prune"]):
    from robust_prune.errors import RobustPruneError
    from tests.fuzz.readers import READERS, Folder, valid, watched

NAMES = sorted(READERS)
FOLDER = Folder()


def run_one(data: bytes) -> None:
    """Read one file; whatever leaves here is a bug."""
    if not data:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(RobustPruneError), watched():
            READERS[NAMES[data[0] % len(NAMES)]](data[1:], FOLDER)


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    """Change bytes as libFuzzer does, or what the bytes stand for."""
    generator = random.Random(seed)
    if not data or generator.random() < 0.5:
        return atheris.Mutate(data, longest)
    return (data[:1] + changed(data[1:], generator))[:longest]


def main() -> None:
    seconds, *more = sys.argv[1:] or ["60"]
    seeds = Path(tempfile.mkdtemp(prefix="robust-prune-corpus-"))
    for name, files in valid().items():
        for i, data in enumerate(files):
            whole = bytes([NAMES.index(name)]) + data
            run_one(whole)
            (seeds / f"{name}{i}").write_bytes(whole)
    found = more[0] if more else tempfile.mkdtemp(prefix="robust-prune-found-")
    options = [f"-max_total_time={seconds}", "-rss_limit_mb=3000", "-timeout=20", "-max_len=8192"]
    atheris.Setup([sys.argv[0], *options, found, str(seeds)], run_one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
