"""Context managers that leave a module, and the random state, as they found them."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and every submodule back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Hold Python's garbage collector back where many small objects are made that all stay.

    It would look through all of torch's objects every so often, in up to a tenth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch norms use the statistics of the batch and leave their running ones untouched."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.train()
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode
            layer.track_running_stats = True


@contextlib.contextmanager
def float32_logits(model: nn.Module) -> Iterator[None]:
    """Let the model give float32 logits under autocast: on a CPU losses would stay in bfloat16."""
    handle = model.register_forward_hook(lambda module, inputs, output: output.float())
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def requires_grad(model: nn.Module, flag: bool) -> Iterator[None]:
    """Set `requires_grad` of every parameter, and put each back afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(flag)
    try:
        yield
    finally:
        for parameter, old in flags:
            parameter.requires_grad_(old)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators, and restore their states afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=cuda):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators as tensors and numbers."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.array(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Put the generators into states that `random_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)
