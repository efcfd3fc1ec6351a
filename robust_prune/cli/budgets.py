"""How much a compression is to remove: a ratio, a drop, or a plan that is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from robust_prune.errors import UsageError
from robust_prune.untrusted import read_json

if TYPE_CHECKING:
    from robust_prune.types import PruningPlan


def check_budget(
    prune_ratio: float | None, max_drop: float | None, replayed: PruningPlan | None
) -> None:
    """Raise unless one thing says how much goes."""
    given = [
        flag
        for flag, value in (("--ratio", prune_ratio), ("--max-drop", max_drop))
        if value is not None
    ]
    if given and replayed is not None:
        raise UsageError(f"--plan brings its own budget; leave out {given[0]}, or the plan")
    if len(given) == 2:
        raise UsageError("--ratio and --max-drop: one of them says how much goes; leave one out")
    if not given and replayed is None:
        raise UsageError(
            "say how much to remove: --ratio 0.5 removes half of the multiply-adds, --max-drop 1 "
            "what costs at most a point of robust accuracy"
        )


def read_plan(path: Path) -> PruningPlan:
    """Return the plan of a plan file or a report."""
    from robust_prune.errors import PlanError
    from robust_prune.types import PruningPlan

    try:
        data = read_json(path)
    except FileNotFoundError:
        raise PlanError(f"{path}: no such plan or report") from None
    except OSError as error:
        raise PlanError(f"{path}: can't be read: {error.strerror}") from None
    except ValueError as error:
        raise PlanError(f"{path}: not JSON: {error}") from None
    try:
        return PruningPlan.from_plain(data.get("plan", data) if isinstance(data, dict) else data)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None
