"""A model compressed into a folder: its file, its report, and what is left after a break."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from robust_prune import report
from robust_prune.data import DataSplits
from robust_prune.distributed import ALONE, Processes
from robust_prune.errors import Interrupted, UsageError
from robust_prune.files import write_text
from robust_prune.models import save
from robust_prune.modules import check_float32
from robust_prune.pipeline.compression import run
from robust_prune.pipeline.describing import asked, without_times
from robust_prune.pipeline.holding import held_for_all
from robust_prune.pipeline.run_folder import RunFolder, clear_drafts
from robust_prune.pipeline.settings import CompressResult, Events, Settings

RUN = "run"  # where a result's folder keeps the state of the run


def compress_file(
    model: nn.Module,
    splits: DataSplits | None,
    settings: Settings,
    folder: Path,
    name: str,
    events: Events,
    *,
    arguments: Mapping[str, Any] | None = None,
    resume: bool = False,
    processes: Processes = ALONE,
) -> tuple[CompressResult, dict[str, Path]]:
    """Compress and write `<name>.safetensors`, `report.json` and `report.html` into `folder`.

    The model is written as soon as it is pruned, again when it is fine-tuned, and completed after
    the evaluation, each time whole or not at all. Where `arguments` are given, `folder/run` keeps
    the state of the run, and them for whoever goes on with it.

    Raises:
        Interrupted: the user stopped the run; the message says which file is there.
        RunError: `resume`, and the run there is another one.
    """
    check_float32(model)
    paths = {
        "model": folder / f"{name}.safetensors",
        "report": folder / "report.json",
        "html": folder / "report.html",
    }
    written: list[str] = []

    def write(result: CompressResult) -> None:
        if not processes.first:
            return
        text, page = report.to_json(result.report), report.to_html(result.report)
        save(result.model, paths["model"], without_times(result.report))
        written.append(result.report["status"])
        write_text(paths["report"], text)
        write_text(paths["html"], page)

    def begin(state: RunFolder) -> None:
        config = asked(model, splits, settings, processes)
        state.open({**config, "arguments": dict(arguments or {})}, resume=resume)
        clear_drafts(folder)
        if resume and paths["model"].exists():
            written.append("that of the run before")

    state = None if arguments is None else RunFolder(folder / RUN)
    made = not folder.exists()
    processes.on_first(lambda: _make_folder(folder))
    heard = replace(events, saveable=write)
    try:
        with held_for_all(state, processes, begin):
            with _forgetting(state if processes.first and not resume else None, written):
                result = run(model, splits, settings, heard, folder=state, processes=processes)
            if processes.first and state is not None:
                state.close()
    except KeyboardInterrupt:
        if state is None and processes.first and made and not written:
            _remove_empty(folder)
        told = _stopped(paths["model"], written)
        go_on = "" if state is None else f"; robust-prune compress --resume {folder} goes on"
        raise Interrupted(told + go_on) from None
    except Exception:
        if processes.first and made and not resume and not written:
            _remove_empty(folder)
        raise
    return result, paths


@contextlib.contextmanager
def _forgetting(state: RunFolder | None, written: Sequence[str]) -> Iterator[None]:
    """Leave no run behind that failed before anything was written."""
    try:
        yield
    except Exception:
        if state is not None and not written:
            state.clear()
        raise


def _stopped(file: Path, written: Sequence[str]) -> str:
    """Say what a run that was stopped has left, by the statuses it has written."""
    if not written:
        return "stopped before anything was pruned; no file was written"
    return f"stopped; {file} is complete and usable, its status is {written[-1]!r}"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror}; name another folder") from None


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
