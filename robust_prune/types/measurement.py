"""What was measured on a model, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from robust_prune.errors import UsageError
from robust_prune.statistics import PairedTest, Proportion
from robust_prune.types.model import Cost
from robust_prune.types.threat import ThreatModel


@dataclass(frozen=True)
class Measurement:
    """Accuracy under one attack: which images stayed right, and how it was measured."""

    attack: str
    accuracy: Proportion
    correct: tuple[bool, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    seconds: float = 0.0

    def derived(self) -> dict[str, str]:
        """Return the verdicts as one string: an entry for each image would be long."""
        return {"correct": "".join("01"[verdict] for verdict in self.correct)}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Measurement:
        """Build it from parsed JSON."""
        share = data["accuracy"]
        accuracy = Proportion(share["successes"], share["n"], share["confidence"])
        correct = tuple(verdict == "1" for verdict in data["correct"])
        return cls(
            **{**data, "accuracy": accuracy, "correct": correct, "flags": tuple(data["flags"])}
        )


@dataclass(frozen=True)
class Evaluation:
    """Clean and robust accuracy of one model on one set of images."""

    split: str
    n: int
    seed: int
    threat: ThreatModel
    measurements: tuple[Measurement, ...]
    cost: Cost | None = None
    latency_ms: float | None = None

    def get(self, attack: str) -> Measurement | None:
        """Return the measurement under `attack`, or None where it was not made."""
        return next((m for m in self.measurements if m.attack == attack), None)

    def compare(self, other: Evaluation) -> dict[str, PairedTest]:
        """Test this model against `other`, attack by attack, on the same images.

        Raises:
            UsageError: the two were measured on other images, or against another threat.
        """
        for what in ("split", "n", "seed", "threat"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                raise UsageError(
                    f"a paired test takes the same images and threat: {what} is {mine} here and "
                    f"{theirs} there; evaluate both models alike"
                )
        return self._paired(other)

    def _paired(self, other: Evaluation) -> dict[str, PairedTest]:
        tests = {}
        for mine in self.measurements:
            theirs = other.get(mine.attack)
            if theirs is None or len(theirs.correct) != len(mine.correct):
                continue
            pairs = list(zip(mine.correct, theirs.correct, strict=True))
            tests[mine.attack] = PairedTest(
                first_only=sum(a and not b for a, b in pairs),
                second_only=sum(b and not a for a, b in pairs),
            )
        return tests
