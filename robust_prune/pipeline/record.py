"""The record of a run: what its stations tell, typed, and as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from robust_prune.finetune import History
from robust_prune.repair import Fit
from robust_prune.types import Curve, PruningPlan, to_plain, without_nan


@dataclass(frozen=True)
class Candidate:
    """One of the plans compared: its adversarial loss when pruned, in nats, and what it keeps."""

    loss: float
    params: int
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Search:
    """The plans compared, by which attack on how many images, and the index of the chosen one."""

    attack: str
    images: int
    chosen: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class SelfCheck:
    """How far the pruned model is from the masked one, relative to its outputs."""

    done: bool
    images: int | None = None
    dtype: str | None = None
    error: float | None = None


@dataclass(frozen=True)
class Fitted:
    """What the reconstruction did to each layer, and on how many images."""

    images: int
    layers: tuple[Fit, ...]


@dataclass(frozen=True)
class Recalibrated:
    """How many batch norms got new statistics, and of how many images."""

    layers: int
    images: int


@dataclass(frozen=True)
class Timed:
    """Milliseconds of the dense and the pruned model, by turns, and what the model of time said.

    `asked` is the share of the dense model's time that was to be left, `rounds` how many plans
    were timed.
    """

    conditions: str
    asked: float
    dense_ms: float
    pruned_ms: float
    modelled_ms: float
    rounds: int


@dataclass(frozen=True)
class Tried:
    """What a ratio cost: robust accuracy lost on `images`, and its interval, all in shares.

    `removed` is the share of the budget's target that went.
    """

    prune_ratio: float
    removed: float
    images: int
    dense: float
    pruned: float
    drop: float
    interval: tuple[float, float]
    within: bool


@dataclass(frozen=True)
class DropSearch:
    """The search for the largest ratio within `max_drop` percentage points of robust accuracy.

    `models` says whether those measured were fine-tuned; `chosen` is the ratio that was taken.
    """

    max_drop: float
    models: str
    attack: str
    seed: int
    split: str
    chosen: float
    tried: tuple[Tried, ...]


@dataclass(frozen=True)
class Pruned:
    """What the stations of one pruning step tell; None where one has told nothing.

    `calibration` says what it was decided on, and what that is worth (`grade_of`); `blocks` by how
    much the adversarial loss rises without a residual block, in nats.
    """

    reachable: float | None = None
    calibration: Mapping[str, Any] | None = None
    curves: tuple[Curve, ...] | None = None
    blocks: Mapping[str, float] | None = None
    search: Search | None = None
    drop_search: DropSearch | None = None
    latency: Timed | None = None
    self_check: SelfCheck | None = None
    reconstruction: Fitted | None = None
    batchnorm: Recalibrated | None = None

    def plain(self) -> dict[str, Any]:
        """Return what was told as plain data."""
        plain: dict[str, Any] = _told(to_plain(self))
        return plain

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Pruned:
        """Build it from parsed JSON."""
        curves, search = data.get("curves"), data.get("search")
        check, fitted = data.get("self_check"), data.get("reconstruction")
        batchnorm, latency = data.get("batchnorm"), data.get("latency")
        drops = data.get("drop_search")
        return cls(
            reachable=data.get("reachable"),
            calibration=data.get("calibration"),
            curves=None if curves is None else tuple(map(Curve.from_plain, curves)),
            blocks=data.get("blocks"),
            search=None if search is None else _search(search),
            drop_search=None if drops is None else _drop_search(drops),
            latency=None if latency is None else Timed(**latency),
            self_check=None if check is None else SelfCheck(**check),
            reconstruction=None if fitted is None else _fitted(fitted),
            batchnorm=None if batchnorm is None else Recalibrated(**batchnorm),
        )


@dataclass(frozen=True)
class Step:
    """A pruning step that is over, where there are several."""

    plan: PruningPlan
    history: History | None
    pruned: Pruned

    def plain(self) -> dict[str, Any]:
        """Return it as plain data, named as the report of a whole run names it."""
        return {
            **self.pruned.plain(),
            "plan": to_plain(self.plan),
            "finetune": plain_history(self.history),
        }


@dataclass(frozen=True)
class Record:
    """What a run has told so far.

    Attributes:
        notes: lines that the user should not miss.
        seconds: by station.
        pruned: of the pruning step that the run is at.
        steps: those before it.
    """

    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    pruned: Pruned = field(default_factory=Pruned)
    steps: tuple[Step, ...] = ()

    def plain(self) -> dict[str, Any]:
        """Return it as the run's folder keeps it beside each part."""
        return {
            "notes": list(self.notes),
            "seconds": dict(self.seconds),
            "parts": self.pruned.plain(),
            "steps": [step.plain() for step in self.steps],
        }


def plain_history(history: History | None) -> dict[str, Any] | None:
    """Return a training history as JSON can hold it."""
    if history is None:
        return None
    plain: dict[str, Any] = without_nan(to_plain(history))
    return plain


def _search(data: Mapping[str, Any]) -> Search:
    candidates = tuple(
        Candidate(c["loss"], c["params"], tuple(c["widths"])) for c in data["candidates"]
    )
    return Search(data["attack"], data["images"], data["chosen"], candidates)


def _drop_search(data: Mapping[str, Any]) -> DropSearch:
    return DropSearch(**{**data, "tried": tuple(map(tried, data["tried"]))})


def tried(data: Mapping[str, Any]) -> Tried:
    """Build what a ratio cost from parsed JSON."""
    low, high = data["interval"]
    return Tried(**{**data, "interval": (low, high)})


def _fitted(data: Mapping[str, Any]) -> Fitted:
    return Fitted(data["images"], tuple(Fit(**layer) for layer in data["layers"]))


def _told(value: Any) -> Any:
    """Return plain data without the entries that are None."""
    if isinstance(value, dict):
        return {name: _told(item) for name, item in value.items() if item is not None}
    return [_told(item) for item in value] if isinstance(value, list) else value
