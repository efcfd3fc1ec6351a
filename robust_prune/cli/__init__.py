"""The command line: `robust-prune COMMAND`.

Exit codes: 0 done; 1 a fault of this program; 2 a wrong argument; 3 a model file that can't be
used; 4 data that can't be used; 5 a plan or budget that does not fit; 6 training or an attack
that failed; 130 stopped by the user.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import typer

from robust_prune import stopping
from robust_prune.cli import compare, compress, evaluate, export, info, opening, sensitivity, train
from robust_prune.cli.output import Output
from robust_prune.errors import (
    Interrupted,
    MemoryFullError,
    RobustPruneError,
    UsageError,
    first_line,
    out_of_memory,
)
from robust_prune.untrusted import readable

PROGRAM_FLAGS = ("--json", "--quiet", "-q")

app = typer.Typer(
    name="robust-prune",
    help="Make adversarially robust vision models small without losing the robustness.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="--json and --quiet may stand behind a command too. "
    "Exit codes: 0 done, 2 wrong argument, 3 model file, 4 data, 5 plan or budget, "
    "6 training or attack, 130 stopped, 1 a fault of this program.",
)
app.command("compress")(compress.compress)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("info")(info.info)
app.command("export")(export.export)


def _version(value: bool) -> None:
    if value:
        from robust_prune._version import __version__

        print(f"robust-prune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    as_json: bool = typer.Option(
        False, "--json", help="One JSON document on stdout, all else on stderr."
    ),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Only errors and the result."),
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Make adversarially robust vision models small without losing the robustness."""
    ctx.obj = Output(as_json=as_json, quiet=quiet)


def main() -> NoReturn:
    """Run the command line; every foreseen error is one line on stderr."""
    # torch asks for huge pages if this is set before it is imported: on a CPU a training step
    # spends 6 to 15 % of its time in page faults without them
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        with _stopped_by_signals():
            code = _run()
    finally:
        if "robust_prune.distributed" in sys.modules:
            sys.modules["robust_prune.distributed"].leave()
    if code == Interrupted.exit_code:
        _fail("stopped; nothing was written by this command", Interrupted.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let an end of the machine's or queue's and a lost line stop a run as Ctrl-C does.

    Signals that are ignored stay so: `nohup` means it.
    """
    here = threading.current_thread() is threading.main_thread()
    names = ("SIGINT", "SIGTERM", "SIGHUP") if here else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    usual = signal.default_int_handler, signal.SIG_DFL
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) in usual}
    stopping.forget()
    for number in before:
        signal.signal(number, stopping.stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run() -> Any:
    try:
        arguments = _program_first(_none_empty(sys.argv[1:]))
        return app(arguments, prog_name="robust-prune", standalone_mode=False)
    except RobustPruneError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own, for wrong options and arguments
            _usage_error(error)
        if os.environ.get("ROBUST_PRUNE_DEBUG"):
            raise
        if out_of_memory(error):
            _fail(
                f"memory does not suffice ({first_line(error)}); take smaller images "
                "(--input-size), a smaller --batch-size, a smaller model or another machine",
                MemoryFullError.exit_code,
            )
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            _fail(f"{error.filename}: {error.strerror}", 1)
        if (where := _given_code(error)) is not None:
            _fail(f"{where}: {type(error).__name__}: {_last_line(str(error))}", 1)
        _fail(
            f"a fault of robust-prune: {type(error).__name__}: {_last_line(str(error))}; "
            "ROBUST_PRUNE_DEBUG=1 shows where",
            1,
        )


def _none_empty(arguments: list[str]) -> list[str]:
    """Refuse empty text: a path of nothing would be the current folder."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument and not (argument.startswith("--") and argument.endswith("=")):
            continue
        name = argument[:-1] or before
        called = name if name.startswith("-") else "an argument"
        raise UsageError(f"{called} is empty; give it a value (is a shell variable unset?)")
    return arguments


def _given_code(error: BaseException) -> str | None:
    """Return FILE:LINE where an error came out of the current folder's code, None elsewhere."""
    frames = traceback.extract_tb(error.__traceback__)
    here, own = Path.cwd(), Path(__file__).parents[1]
    last = Path(frames[-1].filename) if frames else own
    if not last.is_relative_to(here) or last.is_relative_to(own) or "site-packages" in last.parts:
        return None
    return f"{last.relative_to(here)}, line {frames[-1].lineno}"


def _program_first(arguments: list[str]) -> list[str]:
    """Put the program's own flags before the command: people type them anywhere."""
    flags = [a for a in arguments if a in PROGRAM_FLAGS]
    return [*flags, *(a for a in arguments if a not in PROGRAM_FLAGS)]


def _usage_error(error: Any) -> NoReturn:
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message)
        sys.exit(0)
    command = getattr(getattr(error, "ctx", None), "command_path", "robust-prune")
    message = " ".join(message.split())
    message += "" if message.endswith((".", "?", "!")) else "."
    _fail(f"{message} See {command} --help.", getattr(error, "exit_code", 2))


def _fail(message: str, code: int) -> NoReturn:
    prefix = "" if code == Interrupted.exit_code else "error: "
    if not opening.writes():
        prefix = f"process {os.environ['RANK']}: {prefix}"
    print(prefix + readable(_last_line(message)), file=sys.stderr)
    sys.exit(code)


def _last_line(text: str) -> str:
    """Errors from worker processes bring their traceback; the message is its last line."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else text
