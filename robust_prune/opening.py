"""Files of models, read by the names of their weights and, where widths are new, by the graph."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from robust_prune import models
from robust_prune.graph import numbers_at


def load(
    path_or_name: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    arch: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    cifar_stem: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: tuple[int, int, int] | None = None,
    trust_pickle: bool = False,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Read a model file, or build a pretrained network by its timm name.

    What had to be assumed of a file, such as its normalisation, is a warning.

    Args:
        path_or_name: our own file or folder, a timm checkpoint, a Hugging Face folder as timm
            writes it, a plain state_dict (.pt, .pth, .safetensors), a name such as
            `resnet18.a1_in1k`, or `hf-hub:OWNER/NAME` for a repository of ours or of timm's.
        model: a fresh instance of your own class, for files that `save` wrote of one; its layers
            take the stored widths and weights.
        arch: timm's name of the network, or `torchvision/NAME`, for files that don't say it; one
            that `save` wrote of a bare network, pruned or not, fits the stored widths.
        model_kwargs: arguments for the builder of `arch`.
        cifar_stem: 3x3 stride-1 stem without max-pool, for small images.
        mean, std: normalisation per channel for images in [0, 1]; default: what the file says,
            else timm's configuration of the network.
        input_size: (channels, height, width) of the images.
        trust_pickle: unpickle whole modules; this runs whatever code the file brings.
        device: where to put the model.

    Returns:
        A module in eval mode that takes images in [0, 1], [N, C, H, W], and gives logits [N, K].

    Raises:
        ModelError: the file or the architecture does not fit, with what to change.
        UnsafeFileError: the file is a pickled module and `trust_pickle` was not given.
    """
    opened, record = open_model(
        path_or_name,
        model=model,
        arch=arch,
        model_kwargs=model_kwargs,
        cifar_stem=cifar_stem,
        mean=mean,
        std=std,
        input_size=input_size,
        trust_pickle=trust_pickle,
        device=device,
    )
    for line in record.get("assumed", ()):
        warnings.warn(line, stacklevel=2)
    return opened


def open_model(
    path_or_name: str | os.PathLike[str], **given: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Like `load`, and return the record stored with the model beside it (empty if none)."""
    return models.open_model(path_or_name, follow=numbers_at, **given)
