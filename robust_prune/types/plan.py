"""The plan: which channels stay."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robust_prune.errors import PlanError, UsageError, first_line
from robust_prune.types.budget import Budget
from robust_prune.types.model import Cost, Unprunable
from robust_prune.types.plain import to_plain
from robust_prune.untrusted import parse_json

PLAN_SCHEMA = "robust-prune/plan/1"


@dataclass(frozen=True)
class GroupPlan:
    """What happens to one group: the channels of `name` that stay, in rising order."""

    name: str
    width: int
    keep: tuple[int, ...]
    mrs: float | None = None
    note: str = ""

    @property
    def keep_width(self) -> int:
        """How many channels stay."""
        return len(self.keep)

    @property
    def prune_ratio(self) -> float:
        """Share of the channels that goes."""
        return 1 - self.keep_width / self.width


@dataclass(frozen=True)
class PruningPlan:
    """Which channels stay, as plain data: it can be printed, compared, saved and replayed.

    `blocks` are residual blocks that go whole: the groups inside of them keep nothing.
    """

    budget: Budget
    allocation: str
    score: str
    seed: int
    input_size: tuple[int, int, int]
    dense: Cost
    pruned: Cost
    groups: tuple[GroupPlan, ...]
    unprunable: tuple[Unprunable, ...] = ()
    notes: tuple[str, ...] = ()
    ties: tuple[tuple[str, str], ...] = ()  # `tensor:dim` pairs that the code couples silently
    whole_heads: bool = False
    blocks: tuple[str, ...] = ()

    @property
    def reached(self) -> float:
        """Share of the budget's target that the plan removes."""
        return 1 - self.pruned.of(self.budget.target) / self.dense.of(self.budget.target)

    @property
    def widths(self) -> dict[str, int]:
        """How many channels each group keeps."""
        return {group.name: group.keep_width for group in self.groups}

    def group(self, name: str) -> GroupPlan:
        """Return the plan of one group."""
        for group in self.groups:
            if group.name == name:
                return group
        raise PlanError(f"the plan has no group {name!r}; it has {len(self.groups)} groups")

    def then(self, later: PruningPlan) -> PruningPlan:
        """Return the plan that does this one and then `later`, made on what this one leaves."""
        theirs = {group.name: group for group in later.groups}
        groups = []
        for mine in self.groups:
            after = theirs.pop(mine.name, None)
            if after is not None and after.width != mine.keep_width:
                raise PlanError(
                    f"group {mine.name!r} has {after.width} channels in the later plan, but "
                    f"{mine.keep_width} are left of it"
                )
            if after is None:
                groups.append(mine)
                continue
            keep = tuple(mine.keep[i] for i in after.keep)
            groups.append(dataclasses.replace(mine, keep=keep, note=after.note))
        if theirs:
            raise PlanError(f"group {min(theirs)!r} of the later plan is not in the first")
        return dataclasses.replace(
            self,
            groups=tuple(groups),
            pruned=later.pruned,
            notes=tuple(dict.fromkeys((*self.notes, *later.notes))),
        )

    def renamed(self, names: Mapping[str, str]) -> PruningPlan:
        """Return the plan with other names of groups, where `names` has one."""
        groups = (dataclasses.replace(g, name=names.get(g.name, g.name)) for g in self.groups)
        return dataclasses.replace(self, groups=tuple(groups))

    def to_json(self) -> str:
        """Return the plan as JSON text, the same for the same plan on every machine."""
        plain = {"schema": PLAN_SCHEMA, **to_plain(self)}
        if not self.blocks:
            del plain["blocks"]  # as earlier versions write it, which can then read it
        return json.dumps(plain, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read a plan back; raises PlanError for text that is not one."""
        try:
            data = parse_json(text)
        except ValueError as error:
            raise PlanError(f"the plan is not JSON: {error}") from None
        return cls.from_plain(data)

    @classmethod
    def from_plain(cls, data: Any) -> PruningPlan:
        """Build a plan from parsed JSON, checking every field and index; PlanError says which."""
        import msgspec

        from robust_prune.types.plan_file import PlanFile

        schema = data.get("schema", PLAN_SCHEMA) if isinstance(data, dict) else None
        if schema != PLAN_SCHEMA:
            raise PlanError(
                f"the plan's schema is {str(schema)[:60]!r}; this version reads {PLAN_SCHEMA!r}"
            )
        try:
            found = msgspec.convert(data, PlanFile)
            found.check()
            plan = cls(
                budget=Budget(found.budget.target, found.budget.prune_ratio),  # type: ignore[arg-type]
                allocation=found.allocation,
                score=found.score,
                seed=found.seed,
                input_size=found.input_size,
                dense=Cost(**msgspec.structs.asdict(found.dense)),
                pruned=Cost(**msgspec.structs.asdict(found.pruned)),
                groups=tuple(GroupPlan(**msgspec.structs.asdict(g)) for g in found.groups),
                unprunable=tuple(Unprunable(item.name, item.reason) for item in found.unprunable),
                notes=found.notes,
                ties=found.ties,
                whole_heads=found.whole_heads,
                blocks=found.blocks,
            )
        except (ValueError, UsageError) as error:
            raise PlanError(f"the plan is malformed: {first_line(error)}") from None
        return plan

    @property
    def digest(self) -> str:
        """Short fingerprint of what the plan does, for comparing two runs at a glance."""
        import hashlib  # its first import costs --help 25 ms

        kept = json.dumps([[group.name, group.width, group.keep] for group in self.groups])
        return hashlib.sha256(kept.encode()).hexdigest()[:12]

    def diff(self, other: PruningPlan) -> list[str]:
        """Return one line for each group in which `other` differs from this plan."""
        mine = {group.name: group for group in self.groups}
        theirs = {group.name: group for group in other.groups}
        lines = []
        for name in sorted(mine.keys() | theirs.keys()):
            if name not in theirs or name not in mine:
                lines.append(f"{name}: only in the {'first' if name in mine else 'second'} plan")
            elif mine[name].keep != theirs[name].keep:
                shared = len(set(mine[name].keep) & set(theirs[name].keep))
                lines.append(
                    f"{name}: {mine[name].keep_width} against {theirs[name].keep_width} channels, "
                    f"{shared} of them the same"
                )
        return lines
