"""What the terminal, and TensorBoard, hear of a training run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from robust_prune.cli.output import Output, duration
from robust_prune.errors import UsageError

if TYPE_CHECKING:
    from robust_prune.finetune import EpochRecord, Progress
    from robust_prune.options import OutputOptions

FIRST_LINE_SECONDS = 10.0
SCALARS = ("loss", "clean", "robust", "single_step", "lr", "images_per_second")


@contextmanager
def training_shown(
    output: Output, writing: OutputOptions, folder: Path, arguments: Mapping[str, Any]
) -> Iterator[TrainingProgress]:
    """Give what shows a bar with rate and time left, and a line per epoch, to trackers too.

    Args:
        output: the program's; silent in all processes but the first.
        writing: which trackers there are.
        folder: where TensorBoard's and other files go.
        arguments: what the run was asked, for trackers.
    """
    from robust_prune.distributed import trackers

    board = None if output.silent or not writing.tensorboard else _board(folder)
    names = () if output.silent else writing.track
    told = TrainingProgress(output, board, trackers(names, folder, arguments))
    with told.shown():
        yield told


class TrainingProgress:
    """A bar with rate and time left where there is a terminal, lines now and then elsewhere."""

    def __init__(self, output: Output, board: Any = None, trackers: Sequence[Any] = ()) -> None:
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
        self._board, self._trackers = board, trackers
        self._runs = 0
        self._next_line = FIRST_LINE_SECONDS

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar, and close TensorBoard's files and all trackers at the end."""
        try:
            with self._bar:
                yield
        finally:
            if self._board is not None:
                self._board.close()
            with redirect_stdout(sys.stderr):  # some have a word to say at the end
                for tracker in self._trackers:
                    tracker.finish()

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
        values = {name: getattr(e, name) for name in SCALARS}
        tagged = {
            name if self._runs < 2 else f"{name}/step {self._runs}": value
            for name, value in values.items()
            if value == value  # not NaN
        }
        if self._board is not None:
            for tag, value in tagged.items():
                self._board.add_scalar(tag, value, e.epoch)
            self._board.flush()
        for tracker in self._trackers:
            tracker.log(tagged, step=e.epoch)

    def on_result(self, record: Mapping[str, Any]) -> None:
        """Hear of what a compression came to."""
        if not self._trackers:
            return
        cost, found = record["cost"], record.get("evaluation") or {}
        values = {
            f"removed/{key}": 1 - cost["pruned"][key] / max(cost["dense"][key], 1)
            for key in ("macs", "params")
        }
        for which in ("dense", "pruned"):
            for measured in (found.get(which) or {}).get("measurements", ()):
                values[f"{which}/{measured['attack']}"] = measured["accuracy"]["value"]
        for tracker in self._trackers:
            tracker.log(values)

    def _due(self, p: Progress) -> bool:
        """Whether a log without a bar gets a line now: soon once, then ever more seldom."""
        elapsed = ((p.epoch - 1) * p.total + p.images) / max(p.images_per_second, 1e-9)
        if elapsed < self._next_line:
            return False
        self._next_line = 4 * elapsed
        return True


def _board(folder: Path) -> Any:
    """Return a writer of TensorBoard's files."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "--tensorboard needs tensorboard; pip install 'robust-prune[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"))
