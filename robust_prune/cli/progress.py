"""What the terminal, and TensorBoard, hear of a training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from robust_prune.cli.output import Output, duration
from robust_prune.errors import UsageError

if TYPE_CHECKING:
    from robust_prune.finetune import EpochRecord, Progress

FIRST_LINE_SECONDS = 10.0
SCALARS = ("loss", "clean", "robust", "single_step", "lr", "images_per_second")


@contextmanager
def training_shown(
    output: Output, tensorboard: Path | None = None
) -> Iterator[tuple[Callable[[Progress], None], Callable[[EpochRecord], None]]]:
    """Give listeners that show a bar with rate and time left, and a line per epoch.

    `tensorboard` is the folder to write TensorBoard's files under.
    """
    told = TrainingProgress(output, tensorboard)
    with told.shown():
        yield told.on_progress, told.on_epoch


class TrainingProgress:
    """A bar with rate and time left where there is a terminal, lines now and then elsewhere."""

    def __init__(self, output: Output, tensorboard: Path | None) -> None:
        self._output = output
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[status]}"),
            console=output.console,
            transient=True,
            disable=output.quiet or not output.console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=None, status="")
        self._board = None if output.silent else _board(tensorboard)
        self._runs = 0
        self._next_line = FIRST_LINE_SECONDS

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar, and close TensorBoard's files at the end."""
        try:
            with self._bar:
                yield
        finally:
            if self._board is not None:
                self._board.close()

    def on_progress(self, p: Progress) -> None:
        """Hear of a batch."""
        text = (
            f"loss {p.loss:.3f}, clean {100 * p.clean:.1f} %, robust {100 * p.robust:.1f} %, "
            f"{p.images_per_second:.0f} images/s, {duration(p.seconds_left)} left"
        )
        self._bar.update(
            self._task,
            total=p.total,
            completed=p.images,
            description=f"epoch {p.epoch}/{p.epochs}",
            status=text,
        )
        bar = self._output.console.is_terminal
        if not bar and p.images < p.total and self._due(p):
            left = duration(p.seconds_left)
            self._output.line(f"  {p.images_per_second:.0f} images/s, {left} left")

    def on_epoch(self, e: EpochRecord) -> None:
        """Hear of an epoch; 0 begins a run."""
        self._runs += e.epoch == 0
        what = "before" if e.epoch == 0 else f"epoch {e.epoch}: loss {e.loss:.4f},"
        rate = f", {e.images_per_second:.0f} images/s" if e.epoch else ""
        self._output.line(
            f"  {what} clean {100 * e.clean:.1f} %, robust {100 * e.robust:.1f} % on "
            f"validation ({e.seconds:.0f} s{rate})"
        )
        if self._board is None:
            return
        for name in SCALARS:
            value = getattr(e, name)
            tag = name if self._runs < 2 else f"{name}/step {self._runs}"
            if value == value:  # not NaN
                self._board.add_scalar(tag, value, e.epoch)
        self._board.flush()

    def _due(self, p: Progress) -> bool:
        """Whether a log without a bar gets a line now: soon once, then ever more seldom."""
        elapsed = ((p.epoch - 1) * p.total + p.images) / max(p.images_per_second, 1e-9)
        if elapsed < self._next_line:
            return False
        self._next_line = 4 * elapsed
        return True


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
