"""Where a training run keeps its state."""

from __future__ import annotations

from typing import Any, Protocol


class Saved(Protocol):
    """Where a run keeps its state; `load` gives what `save` was last given."""

    def load(self) -> dict[str, Any] | None:
        """Return the state to go on from, None for a new run."""

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state, whole or not at all."""

    def due(self) -> bool:
        """Whether so much time has passed that a state should be saved within an epoch."""
