"""Module robustness sensitivity as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robust_prune.types.threat import ThreatModel


@dataclass(frozen=True)
class ModuleSensitivity:
    """MRS of one layer: the rise of the mean adversarial loss, in nats."""

    name: str
    kind: str
    params: int
    weight_norm: float
    mrs: float


@dataclass(frozen=True)
class GroupSensitivity:
    """MRS of a channel group: the largest of its members'."""

    name: str
    width: int
    mrs: float
    decided_by: str


@dataclass(frozen=True)
class Sensitivity:
    """Module robustness sensitivity of a whole model, with everything needed to repeat it."""

    method: str
    rho: float
    threat: ThreatModel
    attack: str
    n: int
    seed: int
    adversarial_loss: float
    seconds: float
    modules: tuple[ModuleSensitivity, ...]
    groups: tuple[GroupSensitivity, ...]

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Build it from parsed JSON; raises ValueError where a field has another type."""
        import msgspec

        return msgspec.convert(dict(data), cls)

    def of_groups(self) -> dict[str, float]:
        """Return MRS by group name."""
        return {group.name: group.mrs for group in self.groups}
