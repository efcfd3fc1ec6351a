"""How much is to be removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robust_prune.errors import UsageError

Target = Literal["macs", "params", "channels"]
TARGETS: tuple[Target, ...] = ("macs", "params", "channels")


@dataclass(frozen=True)
class Budget:
    """How much to remove: `prune_ratio` of `target`, in (0, 1)."""

    target: Target
    prune_ratio: float

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UsageError(f"target {self.target!r} is not known; use {', '.join(TARGETS)}")
        if not 0 < self.prune_ratio < 1:
            raise UsageError(
                f"prune ratio {self.prune_ratio:g} must lie between 0 and 1 (both excluded): "
                "0.5 removes half"
            )
