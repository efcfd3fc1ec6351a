"""The data that flows between the stages: frozen, printable, and free of torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from robust_prune.errors import PlanError, UsageError
from robust_prune.proportions import PairedTest, Proportion

Norm = Literal["linf", "l2"]
Target = Literal["macs", "params", "channels"]
NORMS: tuple[Norm, ...] = ("linf", "l2")
TARGETS: tuple[Target, ...] = ("macs", "params", "channels")
DATA_NAMES = ("digits", "cifar10", "cifar100", "svhn")  # data sets that need no folder
PLAN_SCHEMA = "robust-prune/plan/1"


def parse_eps(text: str | float) -> float:
    """Read a perturbation size: `8/255`, `0.5` or a number."""
    try:
        if isinstance(text, str) and "/" in text:
            numerator, denominator = text.split("/")
            value = float(numerator) / float(denominator)
        else:
            value = float(text)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"eps {text!r} is not a number; write it as 8/255 or 0.031") from None
    if not math.isfinite(value) or value <= 0:
        raise UsageError(f"eps {text!r} must be a positive number, such as 8/255")
    return value


@dataclass(frozen=True)
class ThreatModel:
    """What an attacker may do: move an image in [0, 1] by at most `eps` in `norm`."""

    norm: Norm
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UsageError(f"norm {self.norm!r} is not known; use one of {', '.join(NORMS)}")
        object.__setattr__(self, "eps", parse_eps(self.eps))
        if self.norm == "linf" and self.eps >= 1:
            raise UsageError(
                f"linf eps {self.eps:g} covers the whole range of an image in [0, 1]; "
                "did you mean " + f"{self.eps:g}/255?"
            )

    @classmethod
    def linf(cls, eps: str | float) -> ThreatModel:
        """Return the L-infinity ball of radius `eps`, for example `"8/255"`."""
        return cls("linf", parse_eps(eps))

    @classmethod
    def l2(cls, eps: str | float) -> ThreatModel:
        """Return the Euclidean ball of radius `eps`, for example `0.5`."""
        return cls("l2", parse_eps(eps))

    @property
    def eps_text(self) -> str:
        """`eps` as people write it: in 255ths for linf where that is exact enough."""
        steps = self.eps * 255
        if self.norm == "linf" and abs(steps - round(steps)) < 1e-6 and round(steps) >= 1:
            return f"{round(steps)}/255"
        return f"{self.eps:g}"

    def __str__(self) -> str:
        return f"{self.norm} {self.eps_text}"


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


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one image, parameters, and prunable channels of a model."""

    macs: int
    params: int
    channels: int

    def of(self, target: Target) -> int:
        """Return the count that a budget on `target` is about."""
        return int(getattr(self, target))


@dataclass(frozen=True)
class ChannelGroup:
    """Layers whose channels can only be removed together.

    `width` counts the channels of `name`, the layer that stands for the group. A unit is the least
    that can be removed at once: one channel, or one of every block of a grouped convolution or
    head of an attention (`blocks` channels). Channel i belongs to unit i % units, or `units_of[i]`
    where given. `members` are the layers that lose output channels, `readers` input channels.
    """

    name: str
    width: int
    blocks: int
    min_width: int
    members: tuple[str, ...]
    readers: tuple[str, ...]
    units_of: tuple[int, ...] = ()

    def unit(self, channel: int) -> int:
        """Return the unit that a channel belongs to."""
        return self.units_of[channel] if self.units_of else channel % self.units

    @property
    def units(self) -> int:
        """How many units the group has."""
        return self.width // self.blocks

    @property
    def min_units(self) -> int:
        """How many units must stay."""
        return max(1, self.min_width // self.blocks)


@dataclass(frozen=True)
class ModelSpec:
    """Everything but the weights that is needed to build a model again.

    `source` is `timm`, `torchvision` or `custom` (a class of the user's, which only the user can
    build). `input_size` is (channels, height, width); `mean` and `std` are per channel, for images
    in [0, 1].
    """

    source: Literal["timm", "torchvision", "custom"]
    arch: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    cifar_stem: bool = False
    num_classes: int = 0
    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Build a spec from parsed JSON."""
        size = data.get("input_size")
        return cls(
            source=data["source"],
            arch=data["arch"],
            kwargs=dict(data.get("kwargs", {})),
            cifar_stem=bool(data.get("cifar_stem", False)),
            num_classes=int(data.get("num_classes", 0)),
            input_size=_triple(size) if size else None,
            mean=tuple(data.get("mean", ())),
            std=tuple(data.get("std", ())),
        )


@dataclass(frozen=True)
class Unprunable:
    """A layer or group that stays as it is, and why."""

    name: str
    reason: str


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
        """Build it from parsed JSON."""
        return cls(
            **{
                **data,
                "threat": ThreatModel(**data["threat"]),
                "modules": tuple(ModuleSensitivity(**item) for item in data["modules"]),
                "groups": tuple(GroupSensitivity(**item) for item in data["groups"]),
            }
        )

    def of_groups(self) -> dict[str, float]:
        """Return MRS by group name."""
        return {group.name: group.mrs for group in self.groups}


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
    """Which channels stay, as plain data: it can be printed, compared, saved and replayed."""

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

    @property
    def reached(self) -> float:
        """Share of the budget's target that the plan removes."""
        return 1 - self.pruned.of(self.budget.target) / self.dense.of(self.budget.target)

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
            keep = mine.keep if after is None else tuple(mine.keep[i] for i in after.keep)
            groups.append(dataclasses.replace(mine, keep=keep))
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
        return json.dumps({"schema": PLAN_SCHEMA, **to_plain(self)}, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read a plan back; raises PlanError for text that is not one."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"the plan is not JSON: {error}") from None
        return cls.from_plain(data)

    @classmethod
    def from_plain(cls, data: Any) -> PruningPlan:
        """Build a plan from parsed JSON, checking every index."""
        schema = data.get("schema", PLAN_SCHEMA) if isinstance(data, dict) else None
        if schema != PLAN_SCHEMA:
            raise PlanError(f"the plan's schema is {schema!r}; this version reads {PLAN_SCHEMA!r}")
        try:
            plan = cls(
                budget=Budget(**data["budget"]),
                allocation=str(data["allocation"]),
                score=str(data["score"]),
                seed=int(data["seed"]),
                input_size=_triple(data["input_size"]),
                dense=Cost(**data["dense"]),
                pruned=Cost(**data["pruned"]),
                groups=tuple(
                    GroupPlan(**{**group, "keep": tuple(int(i) for i in group["keep"])})
                    for group in data["groups"]
                ),
                unprunable=tuple(Unprunable(**item) for item in data.get("unprunable", ())),
                notes=tuple(data.get("notes", ())),
                ties=tuple((str(a), str(b)) for a, b in data.get("ties", ())),
                whole_heads=bool(data.get("whole_heads", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"the plan is malformed: {type(error).__name__}: {error}") from None
        for group in plan.groups:
            keep = list(group.keep)
            if keep != sorted(set(keep)) or not keep or keep[0] < 0 or keep[-1] >= group.width:
                raise PlanError(
                    f"the plan's group {group.name!r} must keep 1 to {group.width} different "
                    f"channels in rising order, each below {group.width}"
                )
        return plan

    @property
    def digest(self) -> str:
        """Short fingerprint of what the plan does, for comparing two runs at a glance."""
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


@dataclass(frozen=True)
class Measurement:
    """Accuracy under one attack: which images stayed right, and how it was measured."""

    attack: str
    accuracy: Proportion
    correct: tuple[bool, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    seconds: float = 0.0

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
        """Test this model against `other`, attack by attack, on the images they share."""
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


def to_plain(value: Any) -> Any:
    """Turn dataclasses into dictionaries that JSON can hold, with derived figures beside them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Proportion):
            plain |= {"value": value.value, "interval": list(value.interval)}
        if isinstance(value, Measurement):
            plain["correct"] = "".join("01"[verdict] for verdict in value.correct)
        if isinstance(value, PairedTest):
            plain["p_value"] = value.p_value
        return plain
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def _triple(values: Any) -> tuple[int, int, int]:
    channels, height, width = (int(v) for v in values)
    return channels, height, width
