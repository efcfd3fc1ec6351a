"""From option groups to the command line, and from what was typed back to groups."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from robust_prune.cli.resuming import Resuming, arguments_again, arguments_of
from robust_prune.options import Options, Stated, choices, hints, stated

Command = Callable[..., None]


def takes_options(*, resuming: Resuming | None = None) -> Callable[[Command], Command]:
    """Give a command typer's options for each of its parameters that is a group of options.

    The command is then called with frozen groups of checked values. It may also have parameters
    `output`, the program's, and `arguments`, all arguments as JSON can hold them.

    Args:
        resuming: how the command goes on with a run; with --resume its values are the run's.
    """

    def decorate(command: Command) -> Command:
        own_hints = typing.get_type_hints(command, include_extras=True)
        groups = {name: hint for name, hint in own_hints.items() if _is_group(hint)}
        own = [
            parameter.replace(annotation=own_hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(command).parameters.items()
            if name not in (*groups, "output", "arguments")
        ]
        parameters = [*own, *(p for group in groups.values() for p in spread(group))]
        types = {p.name: p.annotation for p in parameters}

        @functools.wraps(command)
        def call(ctx: typer.Context, **typed: Any) -> None:
            plain = arguments_of(ctx)
            if resuming is not None and typed["resume"] is not None:
                plain = arguments_again(ctx, resuming, types, typed["resume"])
                typed = {"resume": typed["resume"], **plain}
            values = {p.name: _value(typed[p.name], types[p.name]) for p in own}
            for name, group in groups.items():
                values[name] = gathered(group, typed)
            extras = {"output": ctx.obj, "arguments": plain}
            command(**values, **{name: v for name, v in extras.items() if name in own_hints})

        context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        call.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
        call.__annotations__ = {"ctx": typer.Context, **types}
        return call

    return decorate


def spread(group: type[Options]) -> list[inspect.Parameter]:
    """Return a group's options as parameters that typer reads."""
    types = hints(group)
    defaults = {f.name: f.default for f in dataclasses.fields(group)}
    inherited = {
        name for base in group.__mro__[1:] for name in vars(base).get("__annotations__", ())
    }
    return [
        _parameter(name, what, types[name], defaults[name], group.panel)
        for name, what in sorted(stated(group).items(), key=lambda item: item[0] in inherited)
        if what.shown
    ]


def gathered(group: type[Any], typed: Mapping[str, Any]) -> Any:
    """Return the group that holds what was typed for its options.

    Raises:
        UsageError: a value is none that the option may have.
    """
    types = hints(group)
    given = {
        name: _value(typed[name], types[name])
        for name, what in stated(group).items()
        if what.shown and not (what.required and typed[name] is None)
    }
    return group(**given)


def _parameter(
    name: str, what: Stated, hint: Any, default: Any, panel: str | None
) -> inspect.Parameter:
    kind = _kind(what, hint)
    flag = what.flag or f"--{name.replace('_', '-')}"
    if flag.startswith("--no-"):
        flag = f" /{flag}"  # what is on unless the flag is said
    elif kind == (bool | None):
        flag = f"{flag}/--no-{flag[2:]}"
    limits: dict[str, Any] = {}
    if what.within is not None and kind in (int, int | None):
        limits["min"] = int(what.within.low)
    words = choices(hint)
    metavar = what.metavar or (f"[{'|'.join(words)}]" if words else None)
    info = typer.Option(
        flag, help=escape(what.help), rich_help_panel=panel, metavar=metavar, **limits
    )
    if what.required or _is_tuple(hint):
        default, kind = None, kind | None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _kind(what: Stated, hint: Any) -> Any:
    """Return the type that typer reads: text where it is parsed later, lists for tuples."""
    if what.parse is not None or hint is Any or choices(hint):
        return str | None
    return list[str] if _is_tuple(hint) else hint


def _value(typed: Any, hint: Any) -> Any:
    """Return what was typed, or recorded, as the value of this type."""
    if _is_tuple(hint):
        return tuple(typed or ())
    bare = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    is_path = Path in (bare, *typing.get_args(bare))
    return Path(typed) if is_path and isinstance(typed, str) else typed


def _is_tuple(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Options)
