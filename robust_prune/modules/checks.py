"""What a module must be, told before the work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from robust_prune.errors import DataError, ModelError, UsageError, first_line, out_of_memory
from robust_prune.modules.contexts import evaluating
from robust_prune.modules.image_model import network_of
from robust_prune.modules.layout import device_of


def check_float32(model: nn.Module) -> None:
    """Raise ModelError where weights are of another floating-point type than images, or no numbers.

    A UsageError says that what is given is no module.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"the model must be a torch.nn.Module, not {type(model).__name__}; robust_prune.load "
            "opens a file or a name"
        )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ModelError(
                f"the model's weights have no shape yet ({name}, of a lazy layer): run it once on "
                "an image before"
            )
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ModelError(
                f"the model's weights are {kind} ({name}), images come in float32; give "
                "model.float()"
            )
        if not parameter.is_meta and not bool(parameter.isfinite().all()):
            raise ModelError(
                f"the model's weights hold NaN or infinity ({name}): is it from a training that "
                "diverged? Take an earlier state"
            )


def check_transparent(net: nn.Module) -> None:
    """Raise ModelError where a part of a network is a program, without layers to look into."""
    for name, module in net.named_modules():
        scripted = isinstance(module, torch.jit.ScriptModule)
        if scripted or hasattr(module, "_orig_mod"):
            kind = "a scripted module" if scripted else "compiled by torch.compile"
            raise ModelError(
                f"{name or 'the network'} is {kind}, which can't be looked into; use the module "
                "that it was made from" + ("" if scripted else ", its _orig_mod")
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ModelError(
                f"{name or 'the network'} is compiled in place, by its compile(), which can't be "
                "looked into; compile after pruning, or set its _compiled_call_impl to None"
            )


@contextlib.contextmanager
def checked(input_size: tuple[int, int, int]) -> Iterator[None]:
    """Turn what a network raises on images of a size that it does not take into a ModelError."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        if out_of_memory(error):
            raise
        line = first_line(error)[:160]
        size = "x".join(map(str, input_size))
        raise ModelError(f"the model does not take a {size} image: {line}") from None


@torch.no_grad()
def check_outputs(
    model: nn.Module, images: Tensor, labels: Tensor, classes: int | None = None
) -> None:
    """Raise DataError unless logits [N, K] of these images fit labels and number of classes.

    A network that says it ends before a classifier, as timm's do by `num_classes=0`, is refused:
    its features are no logits.
    """
    channels, height, width = images.shape[1:]
    with evaluating(model), checked((channels, height, width)):
        logits = model(images[:1].to(device_of(model)))
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"the model must give logits [N, K], not {what}; wrap it so that it does")
    if not logits.is_floating_point():
        kind = str(logits.dtype).removeprefix("torch.")
        raise ModelError(f"the model must give logits as floating-point numbers, not {kind}")
    outputs = logits.shape[1]
    if getattr(network_of(model), "num_classes", None) == 0:
        raise ModelError(
            f"the network ends before a classifier: its {outputs} outputs are features, and labels "
            "need logits; build it with num_classes, or put a classifier behind it"
        )
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
def gives_probabilities(model: nn.Module, images: Tensor) -> bool:
    """Return whether what the model gives for an image is positive and adds up to one."""
    with evaluating(model):
        given = model(images[:1].to(device_of(model)))
    sums = given.sum(1)
    return bool((given >= 0).all()) and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-3))
