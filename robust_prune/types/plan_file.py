"""What a plan's JSON may hold: types and ranges, checked before anything in it is used."""

from __future__ import annotations

from typing import Annotated

import msgspec

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
Text = Annotated[str, msgspec.Meta(max_length=2**16)]
Pixels = Annotated[int, msgspec.Meta(ge=1, le=2**16)]
Channels = Annotated[int, msgspec.Meta(ge=0, lt=2**24)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Budget(msgspec.Struct, forbid_unknown_fields=True):
    target: Name
    prune_ratio: float


class _Cost(msgspec.Struct, forbid_unknown_fields=True):
    macs: Count
    params: Count
    channels: Count


class _Group(msgspec.Struct, forbid_unknown_fields=True):
    name: Name
    width: Channels
    keep: tuple[Channels, ...]
    mrs: float | None = None
    note: Text = ""


class _Unprunable(msgspec.Struct, forbid_unknown_fields=True):
    name: Name
    reason: Text


class PlanFile(msgspec.Struct, forbid_unknown_fields=True):
    """A plan as it is stored; `schema` is compared before."""

    budget: _Budget
    allocation: Name
    score: Name
    seed: Count
    input_size: tuple[Pixels, Pixels, Pixels]
    dense: _Cost
    pruned: _Cost
    groups: tuple[_Group, ...]
    schema: str = ""
    unprunable: tuple[_Unprunable, ...] = ()
    notes: tuple[Text, ...] = ()
    ties: tuple[tuple[Name, Name], ...] = ()
    whole_heads: bool = False
    blocks: tuple[Name, ...] = ()

    def check(self) -> None:
        """Raise ValueError where fields do not go together."""
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            raise ValueError(f"two groups are called {max(names, key=names.count)[:80]!r}")
        if len(set(self.blocks)) < len(self.blocks):
            raise ValueError("a block is named twice - at `$.blocks`")
        for cost in ("macs", "params", "channels"):
            if getattr(self.pruned, cost) > getattr(self.dense, cost):
                raise ValueError(f"more {cost} pruned than dense - at `$.pruned.{cost}`")
        for group in self.groups:
            keep = list(group.keep)
            goes = any(group.name.startswith(f"{block}.") for block in self.blocks)
            if (
                keep != sorted(set(keep))
                or not (keep or goes)
                or max(keep, default=0) >= group.width
            ):
                raise ValueError(
                    f"the plan's group {group.name[:80]!r} must keep 1 to {group.width} different "
                    f"channels in rising order, each below {group.width}"
                )
