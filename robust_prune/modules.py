"""The module on [0, 1] images, and context managers that leave a module as they found it."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robust_prune.errors import DataError, ModelError
from robust_prune.types import ModelSpec


class ImageModel(nn.Module):
    """A network behind its normalisation: images in [0, 1], [N, C, H, W], give logits [N, K].

    `net` holds all weights, so names of layers and of the state_dict are the network's own.
    `spec` says how to build the network again.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.net = net
        self.spec = spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, K] of images [N, C, H, W] in [0, 1]."""
        if images.shape[1] != self.mean.shape[1]:
            raise DataError(
                f"the model takes images of {self.mean.shape[1]} channels, not {images.shape[1]}"
            )
        logits: Tensor = self.net((plain_layout(images) - self.mean) / self.std)
        return logits


def network_of(model: nn.Module) -> nn.Module:
    """Return the module whose layer names people know: the network inside an ImageModel."""
    return model.net if isinstance(model, ImageModel) else model


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer, CPU where there is none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def image_channels(model: nn.Module) -> int:
    """Return how many channels the images have: what the first convolution reads, else 3."""
    if isinstance(model, ImageModel):
        return model.mean.shape[1]
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    first = next(convolutions, None)
    return 3 if first is None else first.in_channels


@torch.no_grad()
def make_contiguous_(model: nn.Module) -> None:
    """Put every parameter and gradient of a CPU model into the contiguous layout."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = plain_layout(parameter.data)
            if parameter.grad is not None:
                parameter.grad = plain_layout(parameter.grad)


def contiguous(model: nn.Module) -> nn.Module:
    """Return the model itself, or a contiguous copy of a CPU model in another layout."""
    if all(p.data.stride() == plain_layout(p.data).stride() for p in model.parameters()):
        return model
    copied = copy.deepcopy(model)
    make_contiguous_(copied)
    return copied


def check_float32(model: nn.Module) -> None:
    """Raise ModelError where weights are of another floating-point type than images."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ModelError(
                f"the model's weights are {kind} ({name}), images come in float32; give "
                "model.float()"
            )


@torch.no_grad()
def check_outputs(
    model: nn.Module, images: Tensor, labels: Tensor, classes: int | None = None
) -> None:
    """Raise DataError unless logits [N, K] of these images fit labels and number of classes."""
    with evaluating(model):
        logits = model(images[:1].to(device_of(model)))
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"the model must give logits [N, K], not {what}; wrap it so that it does")
    outputs = logits.shape[1]
    if classes is not None and classes != outputs:
        raise DataError(
            f"the model has {outputs} outputs, the data has {classes} classes: is it the data "
            "this model was trained on?"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= outputs:
        raise DataError(
            f"labels must lie in 0..{outputs - 1} for a model of {outputs} outputs, but go from "
            f"{low} to {high}"
        )


@torch.no_grad()
def outputs_of(model: nn.Module, images: Tensor) -> int:
    """Return how many classes the model tells apart, from images [N, C, H, W] of its data."""
    with evaluating(model):
        logits: Tensor = model(images[:1].to(device_of(model)))
    return logits.shape[1]


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return the running means and variances of all batch norms."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    found = [t for layer in layers for t in (layer.running_mean, layer.running_var)]
    return [t for t in found if t is not None]


def plain_layout(tensor: Tensor) -> Tensor:
    """Return a CPU tensor in the contiguous layout with its canonical strides.

    torch's CPU convolutions corrupt the heap in the backward pass of narrow layers in the
    channels_last layout. `contiguous()` does not leave that layout where a dimension has size 1
    (grey images, 1x1 kernels): both layouts then count as contiguous, and the strides decide.
    """
    if tensor.device.type != "cpu":
        return tensor
    canonical, step = [], 1
    for size in reversed(tensor.shape):
        canonical.append(step)
        step *= size
    if tensor.stride() == tuple(reversed(canonical)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


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
