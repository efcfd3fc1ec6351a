"""What a run was asked, of which model and on what machine, as plain data."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from robust_prune.data import DataSplits
from robust_prune.distributed import ALONE, Processes
from robust_prune.modules import ImageModel
from robust_prune.pipeline.run_folder import fingerprint
from robust_prune.pipeline.settings import Settings
from robust_prune.types import to_plain

TIMES = ("seconds", "latency_ms", "images_per_second")


def without_times(record: Any) -> Any:
    """Return a record without what a clock said of it, so that the same work is the same bytes."""
    if isinstance(record, Mapping):
        return {name: without_times(v) for name, v in record.items() if name not in TIMES}
    if isinstance(record, (list, tuple)):
        return [without_times(value) for value in record]
    return record


def hardware(device: torch.device) -> dict[str, Any]:
    """Return what figures of speed depend on."""
    info = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        info["gpu"] = torch.cuda.get_device_name(device)
    return info


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Return the spec of a model, or the class where it is the user's own."""
    if isinstance(model, ImageModel):
        plain: dict[str, Any] = to_plain(model.spec)
        return plain
    return {"source": "custom", "arch": f"{type(model).__module__}.{type(model).__qualname__}"}


def plain_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings; a function of the user's is told by its name."""
    plain = {
        name: getattr(settings, name)
        for name in settings.__dataclass_fields__
        if name not in ("plan", "finetune", "measured")
    }
    if settings.max_drop is not None:
        plain["budget"] = {"target": settings.budget.target}  # the plan says the ratio
    method = settings.finetune
    plain["finetune"] = method if isinstance(method, (str, type(None))) else qualified(method)
    return plain


def qualified(function: object) -> str:
    """Return the name of a function of the user's, the same in every process."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def asked(
    model: nn.Module, splits: DataSplits | None, settings: Settings, processes: Processes = ALONE
) -> dict[str, Any]:
    """Return what a run is asked, as plain data: all that its result depends on."""
    plan = settings.plan
    return {
        "model": fingerprint(model),
        "processes": processes.size,
        "data": None if splits is None else splits.described(),
        "settings": to_plain(plain_settings(settings)),
        "plan": plan.digest if plan else None,
    }


def asked_to_train(
    splits: DataSplits,
    start: nn.Module | None,
    teacher: nn.Module | None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Return what a training run is asked beside its arguments, as plain data."""
    return {
        "data": splits.described(),
        "processes": processes.size,
        "start": None if start is None else fingerprint(start),
        "teacher": None if teacher is None else fingerprint(teacher),
    }
