"""What it takes to state an option once, and to read it from there."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from robust_prune.errors import UsageError

# of the command line's names those that have another in Python and no flag of an option's own
ELSEWHERE = {"eps": "threat", "norm": "threat", "out": "run_dir", "n": "n_eval"}
KEY = "robust_prune"  # in a field's metadata
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; an `open` end is not among them. `why` goes into messages."""

    low: float = -math.inf
    high: float = math.inf
    open: str = ""  # "low", "high" or "low high"
    why: str = ""

    def __contains__(self, value: float) -> bool:
        above = value > self.low if "low" in self.open else value >= self.low
        return above and (value < self.high if "high" in self.open else value <= self.high)

    def __str__(self) -> str:
        """`1 or more`, `positive and finite`, `in [0, 1)`."""
        if self.high == math.inf and self.low == 0 and "low" in self.open:
            text = "positive and finite" if "high" in self.open else "positive"
        elif self.high == math.inf:
            text = f"{self.low:g} or more"
        else:
            left, right = "(" if "low" in self.open else "[", ")" if "high" in self.open else "]"
            text = f"in {left}{self.low:g}, {self.high:g}{right}"
        return f"{text}; {self.why}" if self.why else text


@dataclass(frozen=True)
class Stated:
    """What is said of an option beside its name, type and default.

    Attributes:
        help: one sentence for people who see the name.
        words: the name in messages, where it is not that of the field.
        within: the numbers it may be.
        flag: on the command line, where that is not `--` and the name; `--no-x` for what is on
            unless that is said.
        parse: from the command line's text to the value; None where typer reads it.
        shown: whether the command line has it; Python always does.
        required: the command line has no default for it.
    """

    help: str
    words: str = ""
    within: Range | None = None
    flag: str = ""
    parse: Callable[[str], Any] | None = None
    metavar: str | None = None
    shown: bool = True
    required: bool = False


def option(default: Any, help: str, **more: Any) -> Any:  # noqa: A002 - the word of the field
    """Return a field of an option group: its default, its help, and `Stated`'s other fields."""
    return field(default=default, metadata={KEY: Stated(help, **more)})


def other_default(group: type[Options], name: str, default: Any) -> Any:
    """Return a field of another group again, with another default."""
    return field(default=default, metadata={KEY: stated(group)[name]})


def stated(group: type[Options]) -> dict[str, Stated]:
    """Return what is said of each option of a group, by its name."""
    return {f.name: f.metadata[KEY] for f in dataclasses.fields(group) if KEY in f.metadata}


def hints(group: type[Options]) -> dict[str, Any]:
    """Return the type of each option of a group, by its name; made once, since `--help` asks."""
    if group not in _HINTS:
        _HINTS[group] = typing.get_type_hints(group)
    return _HINTS[group]


_HINTS: dict[type[Options], dict[str, Any]] = {}


def choices(hint: Any) -> tuple[str, ...]:
    """Return the words that a value of this type may be, none where it is not a choice."""
    for one in (hint, *typing.get_args(hint)):
        if typing.get_origin(one) is Literal:
            return typing.get_args(one)
    return ()


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the groups: every value is checked, also one that this run does not use."""

    panel: ClassVar[str | None] = None  # of `--help`

    def __post_init__(self) -> None:
        for name, what in stated(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, str) and what.parse is not None:
                value = what.parse(value)
                object.__setattr__(self, name, value)
            if isinstance(value, numbers.Real) and not isinstance(value, (int, float)):
                value = value.item() if hasattr(value, "item") else float(value)  # numpy's
                object.__setattr__(self, name, value)
            if value is not None:
                _check(name, value, what, choices(hints(type(self))[name]))


def _check(name: str, value: Any, what: Stated, words: tuple[str, ...]) -> None:
    """Raise a UsageError where a value is none of those that an option may have."""
    called = what.words or name.replace("_", " ")
    if words and value not in words:
        raise UsageError(f"{called} {value!r} is not known; use one of {', '.join(words)}")
    if what.within is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{called} must be a number, not {value!r}")
    if value not in what.within:  # NaN is in no range
        raise UsageError(f"{called} {value:g} must be {what.within}")


def takes(
    *groups: type[Options], renamed: Mapping[str, str | None] | None = None
) -> Callable[[F], F]:
    """Let a function's `**options` be those of the groups, in its signature and for its callers.

    A name that is not known is a UsageError with the nearest one that is.

    Args:
        groups: whose options the function takes beside its own parameters.
        renamed: names of the version before, to those of today, or None for a mapping of options;
            they still work, and warn.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in own}
        options = [
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type
            )
            for group in groups
            for f in dataclasses.fields(group)
            if f.name not in names
        ]
        known = [*names, *(p.name for p in options)]
        flags = {
            what.flag.removeprefix("--").replace("-", "_"): name
            for group in groups
            for name, what in stated(group).items()
            if what.flag
        }

        @functools.wraps(function)
        def call(*arguments: Any, **given: Any) -> Any:
            return function(*arguments, **_known(given, known, renamed or {}, ELSEWHERE | flags))

        call.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def _known(
    given: Mapping[str, Any],
    known: list[str],
    renamed: Mapping[str, str | None],
    elsewhere: Mapping[str, str],
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in given.items():
        new = renamed.get(name, name)
        if new != name:
            told = "given by its entries' own names" if new is None else repr(new)
            warnings.warn(f"{name!r} is now {told}", DeprecationWarning, stacklevel=3)
        if new is None:
            found |= _known(value, known, {}, elsewhere)
            continue
        if new not in known:
            near = [elsewhere[new]] if elsewhere.get(new) in known else []
            near = near or difflib.get_close_matches(new, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise UsageError(f"option {name!r} is not known; {hint}")
        found[new] = value
    return found


def chosen(group: type[Any], *sources: Options) -> dict[str, Any]:
    """Return the values that groups have for the options of another one."""
    names = {f.name for f in dataclasses.fields(group)}
    return {
        f.name: getattr(source, f.name)
        for source in sources
        for f in dataclasses.fields(source)
        if f.name in names
    }
