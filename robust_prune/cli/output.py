"""The one place that prints: human text, JSON, or only what matters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from robust_prune.errors import UsageError
from robust_prune.untrusted import readable

if TYPE_CHECKING:
    from robust_prune.finetune import EpochRecord, Progress

FIRST_LINE_SECONDS = 10.0


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

    @contextmanager
    def training(
        self, tensorboard: Path | None = None
    ) -> Iterator[tuple[Callable[[Progress], None], Callable[[EpochRecord], None]]]:
        """Give listeners that show a bar with rate and time left, and a line per epoch.

        `tensorboard` is the folder to write TensorBoard's files under.
        """
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            transient=True,
            disable=self.quiet or not self.console.is_terminal,
        )
        task = bar.add_task("training", total=None, status="")
        board = None if self.silent else _board(tensorboard)
        runs = 0

        def on_progress(p: Progress) -> None:
            text = (
                f"loss {p.loss:.3f}, clean {100 * p.clean:.1f} %, robust {100 * p.robust:.1f} %, "
                f"{p.images_per_second:.0f} images/s, {duration(p.seconds_left)} left"
            )
            bar.update(
                task,
                total=p.total,
                completed=p.images,
                description=f"epoch {p.epoch}/{p.epochs}",
                status=text,
            )
            if not self.console.is_terminal and p.images < p.total and self._due(p):
                self.line(f"  {p.images_per_second:.0f} images/s, {duration(p.seconds_left)} left")

        def on_epoch(e: EpochRecord) -> None:
            nonlocal runs
            runs += e.epoch == 0
            what = "before" if e.epoch == 0 else f"epoch {e.epoch}: loss {e.loss:.4f},"
            rate = f", {e.images_per_second:.0f} images/s" if e.epoch else ""
            self.line(
                f"  {what} clean {100 * e.clean:.1f} %, robust {100 * e.robust:.1f} % on "
                f"validation ({e.seconds:.0f} s{rate})"
            )
            if board is not None:
                for name in ("loss", "clean", "robust", "single_step", "lr", "images_per_second"):
                    value = getattr(e, name)
                    tag = name if runs < 2 else f"{name}/step {runs}"
                    if value == value:  # not NaN
                        board.add_scalar(tag, value, e.epoch)
                board.flush()

        self._next_line = FIRST_LINE_SECONDS
        try:
            with bar:
                yield on_progress, on_epoch
        finally:
            if board is not None:
                board.close()

    def _due(self, p: Progress) -> bool:
        """Whether a log without a bar gets a line now: soon once, then ever more seldom."""
        elapsed = ((p.epoch - 1) * p.total + p.images) / max(p.images_per_second, 1e-9)
        if elapsed < self._next_line:
            return False
        self._next_line = 4 * elapsed
        return True

    _next_line = 0.0


def _board(folder: Path | None) -> Any:
    """Return a writer of TensorBoard's files, None where none is asked for."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "--tensorboard needs tensorboard; pip install 'robust-prune[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"))


def duration(seconds: float) -> str:
    """Return `45 s`, `3 min` or `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
