"""The robust dense models that everything is compared on: trained once, kept in a cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.criteria.networks import Network
from robust_prune.data import DataSplits
from robust_prune.errors import DataError
from robust_prune.finetune import EpochRecord, TrainingConfig, native_bfloat16, train_
from robust_prune.modules import ImageModel
from robust_prune.types import ThreatModel

CACHE = Path.home() / ".cache" / "robust-prune" / "benchmarks"


def dense_model(
    network: Network,
    splits: DataSplits,
    threat: ThreatModel,
    cache: Path,
    warm: Path | None,
    device: str,
    tell: Callable[[str], None],
    seed: int = 0,
) -> tuple[ImageModel, dict[str, Any]]:
    """Return the trained network and how it was trained; train it where the cache has none."""
    path = cache / f"{network.name}-{Path(splits.name).name}-{seed}.pt"
    log = path.with_suffix(".json")
    if path.exists():
        model = network.create(splits.classes, splits.input_size, seed)
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.to(device).eval(), {**json.loads(log.read_text()), "digest": digest(model)}
    if splits.validation is None:
        raise DataError(f"{splits.name}: too few images to keep some back for validation")
    model, started_from = network.start(splits.classes, splits.input_size, warm, seed)
    model.to(device)
    config = where_native(TrainingConfig(threat=threat, seed=seed, **network.training), device)

    def tell_epoch(record: EpochRecord) -> None:
        tell(
            f"{network.name}: epoch {record.epoch}/{config.epochs}, loss {record.loss:.3f}, "
            f"validation clean {100 * record.clean:.1f} PGD-10 {100 * record.robust:.1f}, "
            f"{record.seconds:.0f} s"
        )

    history = train_(model, splits.train, splits.validation, config, on_epoch=tell_epoch)
    told = {
        "network": network.name,
        "started_from": started_from,
        "settings": {**asdict(config), "threat": str(threat)},
        "best_epoch": history.best_epoch,
        "validation": history.validation,
        "epochs": [asdict(record) for record in history.epochs],
        "notes": list(history.notes),
    }
    cache.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    torch.save(model.state_dict(), draft)
    log.write_text(json.dumps(told, indent=1) + "\n")
    draft.replace(path)
    return model, {**told, "digest": digest(model)}


def where_native(config: TrainingConfig, device: torch.device | str) -> TrainingConfig:
    """Return a recipe without bfloat16 where the device would emulate it, many times slower."""
    native = native_bfloat16(torch.device(device))
    return config if native else replace(config, amp=False)


def digest(model: nn.Module) -> str:
    """Return a short fingerprint of all weights and statistics."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def check_same(path: Path, label: str, digest: str) -> None:
    """Stop before cells of different dense models are mixed in one record."""
    known = json.loads(path.read_text())["dense"].get(label, {}) if path.exists() else {}
    if known.get("digest", digest) != digest:
        raise SystemExit(
            f"{path.parent} was measured on another dense {label} ({known['digest']}, not "
            f"{digest}); name another --out, or the --cache that holds that model"
        )
