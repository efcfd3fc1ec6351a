"""What a file's record must be before it is shown: another may have written or changed it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from robust_prune.errors import RobustPruneError, first_line
from robust_prune.types import PruningPlan, ThreatModel

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Line = Annotated[str, msgspec.Meta(max_length=2**16)]


class _Cost(msgspec.Struct):
    macs: Count
    params: Count
    channels: Count


class _Costs(msgspec.Struct):
    dense: _Cost
    pruned: _Cost


class _Accuracy(msgspec.Struct):
    value: Share
    n: Count
    interval: tuple[Share, Share]


class _Measured(msgspec.Struct):
    attack: Line
    accuracy: _Accuracy
    flags: list[Line] = []
    details: dict[str, Any] | None = None


class _Evaluation(msgspec.Struct):
    n: Count
    split: Line
    seed: int
    measurements: list[_Measured]
    latency_ms: Annotated[float, msgspec.Meta(ge=0)] | None = None


class _Paired(msgspec.Struct):
    p_value: Share


class _Evaluations(msgspec.Struct):
    dense: _Evaluation | None = None
    pruned_before_finetuning: _Evaluation | None = None
    pruned: _Evaluation | None = None
    paired: dict[str, _Paired] | None = None


class _Check(msgspec.Struct):
    done: bool
    error: float | None = None
    images: Count | None = None
    dtype: Line | None = None


class _Timed(msgspec.Struct):
    conditions: Line
    dense_ms: Annotated[float, msgspec.Meta(gt=0)]
    pruned_ms: Annotated[float, msgspec.Meta(gt=0)]


Points = Annotated[float, msgspec.Meta(ge=-1, le=1)]


class _Tried(msgspec.Struct):
    prune_ratio: Share
    images: Count
    drop: Points
    interval: tuple[Points, Points]
    within: bool


class _DropSearch(msgspec.Struct):
    max_drop: float
    models: Line
    attack: Line
    seed: int
    split: Line
    chosen: Share
    tried: list[_Tried]


class _Grade(msgspec.Struct):
    grade: Line
    labels: Line
    advice: Line | None = None


class _Threat(msgspec.Struct):
    norm: Line
    eps: float


class _Shown(msgspec.Struct):
    """The fields that tables and sentences read; what a record holds besides is not shown."""

    status: Line
    plan: dict[str, Any]
    plan_digest: Line
    cost: _Costs
    threat: _Threat
    data_name: Line
    reachable: Share = 1.0
    self_check: _Check | None = None
    calibration: _Grade | None = None
    latency: _Timed | None = None
    drop_search: _DropSearch | None = None
    evaluation: _Evaluations | None = None


def check_record(record: Mapping[str, Any]) -> None:
    """Check a record that was read from a file.

    Raises:
        ValueError: a field that is shown has another type or range, or the plan is not the one
            that the record gives figures of; the message is one line.
    """
    found = msgspec.convert(dict(record), _Shown)
    drops = found.drop_search
    if drops is not None and drops.chosen not in [one.prune_ratio for one in drops.tried]:
        raise ValueError("the ratio that was taken was not tried - at `$.drop_search`")
    check = found.self_check
    if check is not None and check.done and None in (check.error, check.images, check.dtype):
        raise ValueError("done, without a result - at `$.self_check`")
    try:
        ThreatModel(found.threat.norm, found.threat.eps)  # type: ignore[arg-type]
        plan = PruningPlan.from_plain(found.plan)
    except RobustPruneError as error:
        raise ValueError(first_line(error)) from None
    if plan.digest != found.plan_digest:
        raise ValueError(f"its plan is {plan.digest}, not {found.plan_digest[:40]} as recorded")
    for which in ("dense", "pruned"):
        cost = getattr(found.cost, which)
        if msgspec.structs.asdict(cost) != vars(getattr(plan, which)):
            raise ValueError(f"not the plan's - at `$.cost.{which}`")
