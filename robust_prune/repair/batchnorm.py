"""Batch-norm statistics after pruning: the stored ones describe activations that are gone."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robust_prune.modules import as_memory_allows, device_of, evaluating


@torch.no_grad()
def recalibrate_batchnorm_(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Replace running statistics by the average over `batches`, in place; every image counts alike.

    Only batch-norm layers run in train mode, so dropout and the like stay off. Images are given
    as they are (clean training images by default of the pipeline, not augmented).

    Args:
        model: left in the mode it was in.
        batches: (images [N, C, H, W] in [0, 1], labels).

    Returns:
        The number of layers recalibrated; 0, and nothing changed, for a model without batch norm
        or where no batch has two images.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    before = [{k: v.clone() for k, v in layer.state_dict().items()} for layer in layers]
    momenta = [layer.momentum for layer in layers]
    device = device_of(model)
    with evaluating(model):
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.train()
            used = 0
            for images, _ in batches:
                if len(images) > 1:
                    used = as_memory_allows(
                        functools.partial(_count_, model, layers, used, images.to(device)),
                        len(images),
                        "batch-norm statistics",
                        "they are averages over these parts",
                    )
        except BaseException:
            used = 0
            raise
        finally:
            for layer, momentum, state in zip(layers, momenta, before, strict=True):
                layer.momentum = momentum
                if not used:
                    layer.load_state_dict(state)
    return len(layers) if used else 0


def _count_(
    model: nn.Module, layers: Sequence[_BatchNorm], seen: int, images: Tensor, size: int
) -> int:
    """Let the statistics count a batch, or nothing of it where it can't be run.

    Returns how many images they then are of; before it they are of `seen`.
    """
    states = [{k: v.clone() for k, v in layer.state_dict().items()} for layer in layers]
    # statistics of a single image would be of no use where maps are of one pixel
    parts = [part for part in torch.split(images, max(2, size)) if len(part) > 1]
    try:
        for part in parts:
            seen += len(part)
            for layer in layers:
                layer.momentum = len(part) / seen
            model(part)
    except BaseException:
        for layer, state in zip(layers, states, strict=True):
            layer.load_state_dict(state)
        raise
    return seen
