"""Where the stations of a run write what they have to tell."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from robust_prune import stopping
from robust_prune.finetune import History
from robust_prune.modules import release_memory
from robust_prune.pipeline.record import Pruned, Record, Step
from robust_prune.pipeline.settings import Events
from robust_prune.types import PruningPlan


class Journal:
    """Holds the record of a run as it grows; listeners hear of stages and notes.

    A request to stop that was dropped on its way is raised where a stage or a station begins.
    """

    def __init__(self, events: Events, notes: tuple[str, ...] = ()) -> None:
        self.events = events
        self.record = Record(notes=notes)

    def stage(self, line: str) -> None:
        """Say what begins."""
        stopping.check()
        self.events.stage(line)

    def note(self, line: str) -> None:
        """Say, and keep for the report, something the user should not miss."""
        self.record = replace(self.record, notes=(*self.record.notes, line))
        self.events.note(line)

    def tell(self, **told: Any) -> None:
        """Write down fields of `Pruned`."""
        self.record = replace(self.record, pruned=replace(self.record.pruned, **told))

    @contextlib.contextmanager
    def timed(self, station: str) -> Iterator[None]:
        """Add the seconds of what is done inside to a station's, and give its memory back."""
        stopping.check()
        start = time.perf_counter()
        try:
            yield
        finally:
            release_memory()  # else what is left between its tensors adds to the next station's
            so_far = self.record.seconds.get(station, 0.0)
            self._set_seconds({station: so_far + time.perf_counter() - start})

    def begin_step(self) -> None:
        """Forget what the pruning step before has told."""
        self.record = replace(self.record, pruned=Pruned())

    def end_step(self, plan: PruningPlan, history: History | None) -> None:
        """Keep what a pruning step has told among those that are over."""
        step = Step(plan, history, self.record.pruned)
        self.record = replace(self.record, steps=(*self.record.steps, step))

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Go on from the record that a run before kept at this place.

        The steps before were taken up one by one, so that they are there.
        """
        self.record = replace(
            self.record,
            notes=msgspec.convert(plain["notes"], tuple[str, ...]),
            seconds=msgspec.convert(plain["seconds"], dict[str, float]),
            pruned=Pruned.from_plain(plain["parts"]),
        )

    def count_seconds(self, plain: Mapping[str, Any]) -> None:
        """Let what a run before has worked count, station by station."""
        mine = self.record.seconds
        before = msgspec.convert(plain["seconds"], dict[str, float])
        self._set_seconds({name: max(mine.get(name, 0.0), s) for name, s in before.items()})

    def _set_seconds(self, seconds: Mapping[str, float]) -> None:
        self.record = replace(self.record, seconds={**self.record.seconds, **seconds})
