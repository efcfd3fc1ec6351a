"""Going on with a run: the arguments it was started with, and those that may differ."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from robust_prune.cli import options as o
from robust_prune.errors import RunError, UsageError
from robust_prune.types import DATA_NAMES

# what may be given again: none of it changes the result, but for the device's arithmetic
FREE = {"resume", "device", "workers", "as_json", "quiet", "download", "trust_pickle"}
PATHS = {"plan", "out", "data_root"}
ENUMS: dict[str, type[Enum]] = {"mrs": o.MRSMethod, "eval_": o.Eval, "device": o.Device}
FILES = {"model", "start", "teacher", "data", *PATHS}


def arguments_of(ctx: typer.Context) -> dict[str, Any]:
    """Return a command's arguments as JSON can hold them, files by their whole paths."""
    return {name: _plain(name, value) for name, value in ctx.params.items() if name != "resume"}


def arguments_again(
    ctx: typer.Context, recorded: Mapping[str, Any], method: str, folder: Path
) -> dict[str, Any]:
    """Return the arguments to go on with: those recorded, and those free to differ.

    Nothing recorded makes code run that the user has not named: unpickling and a training method
    of the user's own must be asked for again.

    Args:
        ctx: of the command; what was typed counts.
        recorded: the arguments that the run was started with.
        method: which argument names the training method.
        folder: of the run, for messages.

    Raises:
        UsageError: an argument was typed that the run has its own for.
        RunError: the arguments are not those of this command.
    """
    if not isinstance(recorded, Mapping):
        raise RunError(f"{folder}: its arguments can't be read")
    typed = {name: value for name, value in ctx.params.items() if _was_typed(ctx, name)}
    own = recorded.get(method)
    if isinstance(own, str) and ":" in own and typed.pop(method, None) != own:
        raise UsageError(
            f"the run in {folder} trains by {own}, which is code of yours: name it again with "
            f"--{method} {own}"
        )
    if recorded.get("trust_pickle") and "trust_pickle" not in typed:
        raise UsageError(
            f"the run in {folder} reads a pickle, which runs code: say --trust-pickle again"
        )
    if other := sorted(set(typed) - FREE):
        raise UsageError(
            f"--resume takes everything from the run in {folder}; leave out {_option(other[0])}"
        )
    if unknown := set(recorded) ^ (set(ctx.params) - {"resume"}):
        raise RunError(
            f"{folder}: not a run of this command, or of another version ({min(unknown)})"
        )
    again = {name: _plain(name, value) for name, value in typed.items() if name != "resume"}
    return {**recorded, "download": False, **again}


def arguments_typed(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments as the command line gives them: enumerations and paths.

    Raises:
        RunError: a value is none that this version knows.
    """
    return {name: _typed_again(name, value) for name, value in plain.items()}


def _was_typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def _option(name: str) -> str:
    return "MODEL" if name == "model" else "--" + name.rstrip("_").replace("_", "-")


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if name in FILES and value is not None and value not in DATA_NAMES and Path(value).exists():
        return str(Path(value).resolve())
    return str(value) if isinstance(value, Path) else value


def _typed_again(name: str, value: Any) -> Any:
    try:
        if value is not None and name in ENUMS:
            return ENUMS[name](value)
        return Path(value) if value is not None and name in PATHS else value
    except (ValueError, TypeError):
        raise RunError(f"the run's {name} {value!r} is none that this version knows") from None
