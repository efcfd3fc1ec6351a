"""What a compression notes on its way: lines, seconds, and parts of its record."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from robust_prune.pipeline.settings import Events
from robust_prune.types import to_plain


class Journal:
    """Notes, seconds by station and further parts of the report; listeners hear of each.

    `parts` holds what the report tells of a station, `steps` the same of the steps before the
    last, where pruning goes in several.
    """

    def __init__(self, events: Events) -> None:
        self.events = events
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}
        self.parts: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []

    def stage(self, line: str) -> None:
        """Say what begins."""
        self.events.stage(line)

    def note(self, line: str) -> None:
        """Say, and keep for the report, something the user should not miss."""
        self.notes.append(line)
        self.events.note(line)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of what is done inside to a station's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def snapshot(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        plain: dict[str, Any] = to_plain(
            {
                "notes": self.notes,
                "seconds": self.seconds,
                "parts": self.parts,
                "steps": self.steps,
            }
        )
        return plain

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot."""
        self.notes = list(snapshot["notes"])
        self.seconds = dict(snapshot["seconds"])
        self.parts = dict(snapshot["parts"])
        self.steps = list(snapshot["steps"])
