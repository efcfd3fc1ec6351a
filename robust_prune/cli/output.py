"""The one place that prints: human text, JSON, or only what matters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from robust_prune.untrusted import readable

if TYPE_CHECKING:
    pass


class Output:
    """Human output on stdout; with `as_json` the document alone is there, the rest on stderr."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False, silent: bool = False) -> None:
        self.as_json, self.quiet, self.silent = as_json, quiet or silent, silent
        self.console = Console(stderr=as_json, highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console = Console(stderr=as_json, highlight=False, soft_wrap=True, width=120)

    def only_on(self, first: bool) -> Output:
        """Return this output, silent where the process is not the first."""
        return self if first else Output(as_json=self.as_json, silent=True)

    def line(self, text: str) -> None:
        """Print a line of progress or context."""
        if not self.quiet:
            self.console.print(readable(text), markup=False)

    def result(self, text: str) -> None:
        """Print a line that --quiet keeps."""
        if self.silent:
            return
        if not self.as_json:
            self.console.print(readable(text), markup=False)
        else:
            self.line(text)

    def note(self, text: str) -> None:
        """Print something the user should not miss."""
        if not self.quiet:
            self.console.print(f"note: {readable(text)}", style="yellow", markup=False)

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; numbers to the right. What looks like markup is text."""
        if self.silent or (self.quiet and self.as_json):
            return
        heading = Text(readable(title), style="bold")
        table = Table(title=heading, title_justify="left", header_style="bold")
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(readable(cell)) for cell in row))
        self.console.print(table, soft_wrap=False)

    def document(self, value: Any) -> None:
        """Print the one JSON document, where JSON was asked for."""
        if self.as_json and not self.silent:
            print(json.dumps(value, indent=1, sort_keys=True, allow_nan=False))


def duration(seconds: float) -> str:
    """Return `45 s`, `3 min` or `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
