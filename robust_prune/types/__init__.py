"""The data that flows between the stages: frozen, printable, and free of torch."""

from robust_prune.types.budget import TARGETS, Budget, Target
from robust_prune.types.curve import LARGEST_RISE, Curve
from robust_prune.types.measurement import Evaluation, Measurement
from robust_prune.types.model import DATA_NAMES, ChannelGroup, Cost, ModelSpec, Unprunable
from robust_prune.types.plain import to_plain, without_nan
from robust_prune.types.plan import GroupPlan, PruningPlan
from robust_prune.types.sensitivity import GroupSensitivity, ModuleSensitivity, Sensitivity
from robust_prune.types.threat import NORMS, Norm, ThreatModel, parse_eps

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
