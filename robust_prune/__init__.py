"""Make adversarially robust vision models small without losing the robustness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from robust_prune._version import __version__
from robust_prune.errors import RobustPruneError

if TYPE_CHECKING:
    from robust_prune.comparing import compare
    from robust_prune.evaluation import evaluate
    from robust_prune.exporting import export
    from robust_prune.graph import DependencyGraph, adapter, dependency_graph, prune_
    from robust_prune.hub import from_pretrained, push_to_hub, save_pretrained
    from robust_prune.importance import MRSImportance
    from robust_prune.models import save
    from robust_prune.opening import load
    from robust_prune.pipeline import CompressResult, compress, sensitivity
    from robust_prune.quantising import export_int8
    from robust_prune.types import Budget, PruningPlan, ThreatModel

# imported on first use, so that `robust-prune --help` does not wait for torch
_HOMES = {
    "adapter": "graph",
    "export": "exporting",
    "export_int8": "quantising",
    "Budget": "types",
    "CompressResult": "pipeline",
    "DependencyGraph": "graph",
    "MRSImportance": "importance",
    "PruningPlan": "types",
    "ThreatModel": "types",
    "compare": "comparing",
    "compress": "pipeline",
    "dependency_graph": "graph",
    "evaluate": "evaluation",
    "from_pretrained": "hub",
    "load": "opening",
    "prune_": "graph",
    "push_to_hub": "hub",
    "save": "models",
    "save_pretrained": "hub",
    "sensitivity": "pipeline",
}

__all__ = [
    "adapter",
    "export",
    "export_int8",
    "Budget",
    "CompressResult",
    "DependencyGraph",
    "MRSImportance",
    "PruningPlan",
    "RobustPruneError",
    "ThreatModel",
    "__version__",
    "compare",
    "compress",
    "dependency_graph",
    "evaluate",
    "from_pretrained",
    "load",
    "prune_",
    "push_to_hub",
    "save",
    "save_pretrained",
    "sensitivity",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'robust_prune' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"robust_prune.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
