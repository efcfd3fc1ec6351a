"""The data that flows between the stages: frozen, printable, and free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust_prune.types.budget import TARGETS, Budget, Target
    from robust_prune.types.curve import LARGEST_RISE, Curve
    from robust_prune.types.measurement import Evaluation, Measurement
    from robust_prune.types.model import (
        DATA_NAMES,
        PUBLIC_DATA,
        ChannelGroup,
        Cost,
        ModelSpec,
        Unprunable,
    )
    from robust_prune.types.plain import to_plain, without_nan
    from robust_prune.types.plan import GroupPlan, PruningPlan
    from robust_prune.types.sensitivity import GroupSensitivity, ModuleSensitivity, Sensitivity
    from robust_prune.types.threat import NORMS, Norm, ThreatModel, parse_eps

# imported on first use, so that the help page builds only the classes that it needs
_FILES = {
    "budget": ("TARGETS", "Budget", "Target"),
    "curve": ("LARGEST_RISE", "Curve"),
    "measurement": ("Evaluation", "Measurement"),
    "model": ("DATA_NAMES", "PUBLIC_DATA", "ChannelGroup", "Cost", "ModelSpec", "Unprunable"),
    "plain": ("to_plain", "without_nan"),
    "plan": ("GroupPlan", "PruningPlan"),
    "sensitivity": ("GroupSensitivity", "ModuleSensitivity", "Sensitivity"),
    "threat": ("NORMS", "Norm", "ThreatModel", "parse_eps"),
}
_HOMES = {name: file for file, names in _FILES.items() for name in names}

__all__ = [
    "NORMS",
    "Norm",
    "TARGETS",
    "without_nan",
    "Budget",
    "ChannelGroup",
    "Cost",
    "Curve",
    "DATA_NAMES",
    "PUBLIC_DATA",
    "Evaluation",
    "GroupPlan",
    "GroupSensitivity",
    "LARGEST_RISE",
    "Measurement",
    "ModelSpec",
    "ModuleSensitivity",
    "PruningPlan",
    "Sensitivity",
    "Target",
    "ThreatModel",
    "Unprunable",
    "parse_eps",
    "to_plain",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'robust_prune.types' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"robust_prune.types.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
