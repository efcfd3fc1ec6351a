"""Going on with a run: the arguments it was started with, and those that may differ."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from robust_prune.errors import RunError, UsageError
from robust_prune.types import DATA_NAMES

# what may be given again: none of it changes the result, but for the device's arithmetic
FREE = {"resume", "device", "workers", "download", "trust_pickle"}
# where `package.module:function` may stand, beside the training method
USERS_CODE = {"score": "--score", "estimator": "--mrs", "allocation": "--allocation"}
FILES = {"model", "start", "teacher", "data", "plan", "out", "data_root", "measured"}


@dataclass(frozen=True)
class Resuming:
    """How a command goes on with a run.

    Attributes:
        run_in: from the folder that --resume names to that of the run's state.
        method: which argument names the training method.
    """

    run_in: Callable[[Path], Path]
    method: str


def arguments_of(ctx: typer.Context) -> dict[str, Any]:
    """Return a command's arguments as JSON can hold them, files by their whole paths."""
    return {name: _plain(name, value) for name, value in ctx.params.items() if name != "resume"}


def arguments_again(
    ctx: typer.Context, resuming: Resuming, hints: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Return the arguments to go on with: those recorded, and those free to differ.

    Nothing recorded makes code run that the user has not named: unpickling and a training method
    of the user's own must be asked for again.

    Args:
        ctx: of the command; what was typed counts.
        resuming: how this command goes on.
        hints: the type of each argument.
        folder: what --resume names.

    Raises:
        UsageError: an argument was typed that the run has its own for, or the run is complete.
        RunError: the arguments are not those of this command.
    """
    from robust_prune.pipeline import RunFolder

    run = RunFolder(resuming.run_in(folder))
    recorded = run.config().get("arguments") or {}
    if run.complete:
        raise UsageError(f"the run in {folder} is complete; there is nothing to go on with")
    if not isinstance(recorded, Mapping):
        raise RunError(f"{folder}: its arguments can't be read")
    typed = {name: value for name, value in ctx.params.items() if _was_typed(ctx, name)}
    _check_code(recorded, typed, resuming.method, folder)
    if other := sorted(set(typed) - FREE):
        raise UsageError(
            f"--resume takes everything from the run in {folder}; leave out {_option(other[0])}"
        )
    if unknown := set(recorded) ^ (set(ctx.params) - {"resume"}):
        raise RunError(
            f"{folder}: not a run of this command, or of another version ({min(unknown)})"
        )
    for name, value in recorded.items():
        if not fits(value, hints[name]):
            raise RunError(f"the run's {name} {value!r} is none that this version knows")
    again = {name: _plain(name, value) for name, value in typed.items() if name != "resume"}
    return {**recorded, "download": False, **again}


def fits(value: Any, hint: Any) -> bool:
    """Return whether parsed JSON can be a value of this type."""
    if typing.get_origin(hint) is Annotated:
        return fits(value, typing.get_args(hint)[0])
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(fits(v, typing.get_args(hint)[0]) for v in value)
    if hint is Path:
        return isinstance(value, str)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _check_code(
    recorded: Mapping[str, Any], typed: dict[str, Any], method: str, folder: Path
) -> None:
    """Raise where the run would run code that was not named again; take the naming off `typed`."""
    for name, flag in {method: f"--{method}", **USERS_CODE}.items():
        own = recorded.get(name)
        if isinstance(own, str) and ":" in own and typed.pop(name, None) != own:
            raise UsageError(
                f"the run in {folder} uses {own}, which is code of yours: name it again with "
                f"{flag} {own}"
            )
    if recorded.get("trust_pickle") and "trust_pickle" not in typed:
        raise UsageError(
            f"the run in {folder} reads a pickle, which runs code: say --trust-pickle again"
        )


def _was_typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def _option(name: str) -> str:
    return "MODEL" if name == "model" else "--" + name.rstrip("_").replace("_", "-")


def _plain(name: str, value: Any) -> Any:
    from robust_prune.files import is_there

    if name in FILES and value is not None and value not in DATA_NAMES and is_there(value):
        return str(Path(value).resolve())
    return str(value) if isinstance(value, Path) else value
