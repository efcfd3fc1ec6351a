"""What planning measures, in a file: the plan for another ratio is then made without measuring."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_prune.adversaries import AdversarialSet
from robust_prune.errors import UsageError, first_line
from robust_prune.files import read_state, write_state
from robust_prune.graph import ModelGraph
from robust_prune.modules import device_of
from robust_prune.pipeline.effort import Effort
from robust_prune.pipeline.run_folder import fingerprint
from robust_prune.pipeline.settings import Settings
from robust_prune.registry import ALLOCATIONS
from robust_prune.types import Curve, Sensitivity, to_plain


@dataclass(frozen=True)
class Stored:
    """What was measured: attacked images [N, C, H, W], scores [units] and curves by group, MRS."""

    adversarial: Tensor
    scores: Mapping[str, Tensor]
    curves: Mapping[str, Curve]
    sensitivity: Sensitivity


def key_of(
    graph: ModelGraph, settings: Settings, effort: Effort, images: Tensor, labels: Tensor
) -> dict[str, Any]:
    """Return what a measurement depends on, digests for what is large; the budget is not in it."""
    groups = [[g.name, g.width, g.blocks, *g.members] for g in graph.groups]
    key = {
        "model": fingerprint(graph.model),
        "groups": _digest(json.dumps(groups).encode()),
        "images": _digest(images.cpu().numpy().tobytes() + labels.cpu().numpy().tobytes()),
        "threat": to_plain(settings.threat),
        "seed": settings.seed,
        "score": settings.score,
        "estimator": settings.estimator,
        "curves": bool(ALLOCATIONS.fact(settings.allocation, "curves")),
        "batch size": min(effort.batch_size, settings.batch_size),
        "effort": to_plain(effort),
    }
    plain: dict[str, Any] = json.loads(json.dumps(key))
    return plain


def stored(path: Path, key: Mapping[str, Any], graph: ModelGraph, images: Tensor) -> Stored | None:
    """Return the measurement of a file, None where there is no file yet.

    Raises:
        UsageError: it is of another model, threat, data or setting, or no measurement.
    """
    if not path.exists():
        if not path.parent.is_dir():
            raise UsageError(f"--measured {path}: there is no folder {path.parent}")
        return None
    try:
        state = read_state(path)
        theirs = dict(state["key"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"--measured {path}: no measurement ({first_line(error)})") from None
    for name in sorted(key.keys() | theirs.keys()):
        if key.get(name) != theirs.get(name):
            raise UsageError(
                f"--measured {path}: of another {name} ({_short(theirs.get(name))}, not "
                f"{_short(key.get(name))}); name another file, or delete it to measure anew"
            )
    try:
        return _checked(state, graph, images)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"--measured {path}: no measurement ({first_line(error)})") from None


def store(
    path: Path,
    key: Mapping[str, Any],
    adversarial: AdversarialSet,
    scores: Mapping[str, Tensor],
    curves: Mapping[str, Curve],
    sensitivity: Sensitivity,
) -> None:
    """Write a measurement, whole or not at all."""
    state = {
        "key": dict(key),
        "adversarial": adversarial.images,
        "scores": dict(scores),
        "curves": to_plain(list(curves.values())),
        "sensitivity": to_plain(sensitivity),
    }
    write_state(path, state)


def _checked(state: Mapping[str, Any], graph: ModelGraph, images: Tensor) -> Stored:
    attacked, scores = state["adversarial"], dict(state["scores"])
    if attacked.shape != images.shape or not bool(torch.isfinite(attacked).all()):
        raise ValueError("its images are none of this model's")
    if {name: tuple(s.shape) for name, s in scores.items()} != {
        g.name: (g.units,) for g in graph.groups
    }:
        raise ValueError("its scores are none of this model's")
    curves = [Curve.from_plain(curve) for curve in state["curves"]]
    if curves and [c.group for c in curves] != [g.name for g in graph.groups]:
        raise ValueError("its curves are none of this model's")
    return Stored(
        attacked.to(device_of(graph.model)),
        scores,
        {curve.group: curve for curve in curves},
        Sensitivity.from_plain(state["sensitivity"]),
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
