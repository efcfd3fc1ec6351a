"""A small network, its weights in any wrapping, and what it gives behind a normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from robust_prune.opening import open_model
from tests.conftest import randomize_

KWARGS = {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]}
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.24, 0.23)
GIVEN = {"arch": "resnet18", "model_kwargs": KWARGS}
IDENTITY = {"mean": (0, 0, 0), "std": (1, 1, 1)}
MU, SIGMA = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))


def network(seed: int = 0, classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    return randomize_(timm.create_model("resnet18", num_classes=classes, **KWARGS), seed).eval()


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def opened(folder: Path, content: Any, **given: Any) -> tuple[nn.Module, list[str]]:
    """Write what a library would write, and open it; the model and what is said of the file."""
    path = folder / "file.pt"
    torch.save(content, path)
    model, record = open_model(path, **{**GIVEN, **given})
    return model, record.get("assumed", [])


@torch.no_grad()
def same(model: nn.Module, net: nn.Module, mean: Any = (0, 0, 0), std: Any = (1, 1, 1)) -> bool:
    """Whether a model gives a network's logits behind this normalisation."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return torch.allclose(model(images), net((images - mean) / std), atol=1e-5)
