"""The folder of a run: what was asked, how far it has come, and what it measured.

`config.json` says what was asked, `metrics.jsonl` has a line for each epoch, parts are JSON and
states safetensors with JSON in their headers: reading a stranger's folder runs nothing. Every file
is written whole or not at all, so that a run which is killed at any moment goes on from the last
one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_prune.errors import RunError
from robust_prune.files import locked, read_state, write_state, write_text
from robust_prune.types import without_nan
from robust_prune.untrusted import parse_json, read_json

SCHEMA = "robust-prune/run/2"
EARLIER = ("robust-prune/run/1",)  # whose states were pickles
DELETED = "deleted"  # in the file of what was asked, while the rest goes
STATE_SUFFIX = ".safetensors"
SAVE_SECONDS = 60.0
SAVE_SHARE = 20  # a state takes at most this part of the time


class RunFolder:
    """The files of one run; `path` is made by `begin`."""

    def __init__(self, path: str | os.PathLike[str], *, save_seconds: float = SAVE_SECONDS) -> None:
        self.path = Path(path)
        self.save_seconds = save_seconds

    @property
    def config_path(self) -> Path:
        """Where it stands what was asked."""
        return self.path / "config.json"

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keep other runs out; raises a RunError where one is in there."""
        return locked(self.path)

    def open(self, config: Mapping[str, Any], *, resume: bool) -> None:
        """Go on with the run that is there, or begin one; see `go_on` and `begin`."""
        if resume:
            self.go_on(config)
        else:
            self.begin(config)

    def begin(self, config: Mapping[str, Any]) -> None:
        """Start a run: forget the one that is there, and keep what is asked.

        Raises:
            RunError: the folder holds anything but a run of ours.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; a run needs a folder of its own")
        if self.path.exists():
            clear_drafts(self.path)
            if any(self.path.iterdir()):
                self._asked(earlier=True)  # what is not ours is not deleted
        self.clear()
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise RunError(f"{self.path}: can't be made: {error.strerror}") from None
        text = json.dumps({**config, "schema": SCHEMA}, indent=1, sort_keys=True)
        write_text(self.config_path, text + "\n")

    def config(self) -> dict[str, Any]:
        """Return what was asked.

        Raises:
            RunError: there is no run, it is not one of ours, or it was being deleted.
        """
        asked = self._asked()
        if asked.get(DELETED):
            raise RunError(f"{self.path}: the run was being deleted; start anew")
        return asked

    def _asked(self, *, earlier: bool = False) -> dict[str, Any]:
        """Return what was asked, also by earlier versions where only that it is ours matters."""
        try:
            found = read_json(self.config_path)
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(f"{self.path}: no run there (no config.json)") from None
        except (OSError, ValueError) as error:
            raise RunError(f"{self.config_path}: can't be read: {error}") from None
        schema = found.get("schema") if isinstance(found, dict) else None
        if schema in EARLIER and not earlier:
            raise RunError(
                f"{self.path}: the run was written by an earlier version of robust-prune; "
                "start anew"
            )
        if not isinstance(found, dict) or schema not in (SCHEMA, *EARLIER):
            raise RunError(f"{self.config_path}: not a run of this version ({SCHEMA})")
        return found

    def exists(self) -> bool:
        """Whether a run was begun here, and is not half deleted."""
        return self.config_path.exists() and not self._asked(earlier=True).get(DELETED)

    def go_on(self, config: Mapping[str, Any]) -> None:
        """Check that a run asked for the same, and clear what a kill left half-written.

        Raises:
            RunError: something is different; the message says what.
        """
        there = self.config()
        for name, value in json.loads(json.dumps(config)).items():
            if name != "arguments" and there.get(name) != value:
                raise RunError(
                    f"{self.path} was run with another {name}"
                    f"{_difference(there.get(name), value)}; name another folder, or start anew"
                )

        if self.complete:
            raise RunError(f"the run in {self.path} is complete; there is nothing to go on with")
        clear_drafts(self.path)

    def keep(self, name: str, value: Any) -> None:
        """Keep a part as JSON; NaN is kept as null."""
        write_text(self.path / f"{name}.json", json.dumps(without_nan(value), indent=1) + "\n")

    def kept(self, name: str) -> Any:
        """Return a part, None where it is not there yet."""
        path = self.path / f"{name}.json"
        if not path.exists():
            return None
        try:
            return read_json(path)
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path}: can't be read: {error}; delete it to do its part again"
            ) from None

    def forget(self, name: str) -> None:
        """Delete a part."""
        (self.path / f"{name}.json").unlink(missing_ok=True)

    def state(self, name: str) -> StateFile:
        """Return the file of tensors with this name."""
        return StateFile(self.path / f"{name}{STATE_SUFFIX}", self.save_seconds)

    def metrics(self, part: str) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl` that belong to a part."""
        return [line for line in self._lines() if line.get("part") == part]

    def record(self, part: str, values: Mapping[str, Any]) -> None:
        """Add a line to `metrics.jsonl`; one of the same part and epoch is replaced.

        An epoch that was measured but not saved is done again after a kill, and would stand twice.
        """
        line = {"part": part, **without_nan(values)}
        key = part, line.get("epoch")
        lines = [old for old in self._lines() if (old.get("part"), old.get("epoch")) != key]
        text = "".join(json.dumps(old) + "\n" for old in [*lines, line])
        write_text(self.path / "metrics.jsonl", text)

    def _lines(self) -> Iterator[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        try:
            for text in path.read_text(encoding="utf-8").splitlines():
                line = parse_json(text)
                if not isinstance(line, dict):
                    raise ValueError("no object")
                yield line
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: a line is not JSON ({error}); delete it to go on") from None

    def close(self) -> None:
        """Delete the tensors of a run that is complete; what was asked and measured stays."""
        self.keep("complete", True)  # first: without its tensors a run can't go on
        for path in self.path.glob(f"*{STATE_SUFFIX}"):
            path.unlink(missing_ok=True)

    @property
    def complete(self) -> bool:
        """Whether the run has come to its end."""
        return self.kept("complete") is not None

    def clear(self) -> None:
        """Delete everything; what a kill leaves of it is no run to go on with, but still ours."""
        if self.config_path.exists():
            write_text(self.config_path, json.dumps({"schema": SCHEMA, DELETED: True}) + "\n")
            for path in self.path.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path != self.config_path:
                    path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


class StateFile:
    """A state of tensors, numbers and text in one file."""

    def __init__(self, path: Path, save_seconds: float = SAVE_SECONDS) -> None:
        self.path = path
        self.save_seconds = save_seconds
        self._saved = time.monotonic()
        self._took = 0.0

    def exists(self) -> bool:
        """Whether a state was saved."""
        return self.path.exists()

    def load(self) -> dict[str, Any] | None:
        """Return the state, None where none was saved.

        Raises:
            RunError: the file is not a state.
        """
        if not self.path.exists():
            return None
        try:
            return read_state(self.path)
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.path}: not a readable state ({error}); delete it to do its part again"
            ) from None

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state, whole or not at all.

        Raises:
            RunError: it holds what a file can't, such as an optimizer's own objects.
        """
        start = time.monotonic()
        try:
            write_state(self.path, state)
        except TypeError as error:
            raise RunError(f"{self.path}: can't be kept: {error}") from None
        self._saved = time.monotonic()
        self._took = self._saved - start

    def due(self) -> bool:
        """Whether the last save is long enough ago, in seconds and in shares of its own cost."""
        wait = max(self.save_seconds, SAVE_SHARE * self._took)
        return time.monotonic() - self._saved >= wait


def clear_drafts(folder: Path) -> None:
    """Delete the temporary files of writes that never came to their end."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def fingerprint(model: nn.Module) -> str:
    """Return a short digest of all weights and statistics, by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                return f": {name} {old.get(name)!r}, not {new.get(name)!r}"
    return f" ({old!r}, not {new!r})"
