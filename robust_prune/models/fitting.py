"""Weights of a file put into a network: its names and its shapes."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from robust_prune.errors import ModelError, first_line, out_of_memory
from robust_prune.models.builders import default_input_size
from robust_prune.models.matching import needed
from robust_prune.modules import (
    EmptyForm,
    Fields,
    ImageModel,
    empty_,
    evaluating,
    fit_,
    set_fields_,
)

LARGEST_TRIED = 1024  # pixels of a side, where a file says the size of its images
RUN_ERRORS = (RuntimeError, ValueError, AssertionError, TypeError, IndexError, ZeroDivisionError)


def fill_(net: nn.Module, path: Path, state: Mapping[str, Tensor]) -> None:
    """Put weights into a network of the same names and shapes.

    Raises:
        ModelError: a name is missing or unexpected, or a shape differs.
    """
    given = OrderedDict(state)
    # some classes ask for the version of their state
    given._metadata = getattr(net.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
    own = net.state_dict()
    for name, tensor in state.items():
        if name in own and own[name].is_floating_point() and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"{path}: {name} is of {kind}, which are no weights of floating point; is the "
                "network quantised? Give the weights that it was made from"
            )
    try:
        problems = net.load_state_dict(given, strict=False)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        lines = str(error).splitlines()
        detail = lines[1].strip() if len(lines) > 1 else lines[0]
        raise ModelError(
            f"{path}: {len(lines) - 1} tensors have other shapes than the network built: "
            f"{detail[:200]}; check --arch and --model-kwargs"
        ) from None
    missing = [key for key in problems.missing_keys if needed(key, own[key])]
    check_names(path, missing, problems.unexpected_keys)


def check_names(path: Path, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raise ModelError where names are missing or left over."""
    for name in missing:
        layer, _, leaf = name.rpartition(".")
        inside = re.escape(f"{layer}.parametrizations.{leaf}.".lstrip("."))
        parts = re.compile(rf"(^|\.)({re.escape(name)}_(orig|mask|g|v|u)$|{inside})")
        if len(found := [n for n in unexpected if parts.search(n)]) > 1:
            raise ModelError(
                f"{path}: {name} is computed from other tensors ({found[0]}, {found[1]}): a mask, "
                "weight norm or spectral norm; make it a plain weight, as by "
                "torch.nn.utils.prune.remove or parametrize.remove_parametrizations, and save again"
            )
    if missing or unexpected:
        example = f"missing {missing[0]}" if missing else f"unexpected {unexpected[0]}"
        raise ModelError(
            f"{path}: does not fit the network built: {len(missing)} names missing, "
            f"{len(unexpected)} unexpected ({example}); check --arch and --model-kwargs"
        )


def refill_(
    net: nn.Module,
    path: Path,
    state: Mapping[str, Tensor],
    fields: Fields,
    empty: Mapping[str, EmptyForm],
) -> None:
    """Put widths, the numbers that follow them, and weights into a network, as we stored them."""
    empty_(net, empty)
    fit_(net, state)
    set_fields_(net, fields)
    fill_(net, path, state)


def check_stored_widths(model: ImageModel, path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise ModelError where a file of ours has more channels than the network it was made from."""
    own = model.net.state_dict()
    for name, tensor in state.items():
        theirs, mine = tensor.shape, own[name].shape if name in own else tensor.shape
        if len(theirs) != len(mine) or any(a > b for a, b in zip(theirs, mine, strict=True)):
            raise ModelError(
                f"{path}: its manifest is malformed: {name} is {list(theirs)}, and at most "
                f"{list(mine)} in the {model.spec.arch} that it describes"
            )


def check_classes(model: ImageModel) -> None:
    """Raise ModelError where the last layer has other outputs than the spec has classes."""
    if model.spec.num_classes == 0:
        return
    find = getattr(model.net, "get_classifier", None)
    linear = [module for module in model.net.modules() if isinstance(module, nn.Linear)]
    head = find() if callable(find) else next(reversed(linear), None)
    if isinstance(head, nn.Linear) and head.out_features != model.spec.num_classes:
        raise ModelError(
            f"{head.out_features} outputs, and the model is said to have "
            f"{model.spec.num_classes} classes"
        )


def check_stem(model: ImageModel, path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise ModelError where a file was made for small images and the network built was not."""
    theirs, mine = state.get("conv1.weight"), getattr(model.net, "conv1", None)
    if theirs is None or not isinstance(mine, nn.Conv2d) or theirs.shape == mine.weight.shape:
        return
    if theirs.shape[-1] == 3 and not model.spec.cifar_stem:
        raise ModelError(
            f"{path}: its stem conv1 is 3x3, that of {model.spec.arch} is 7x7: "
            "it was made for small images, add --cifar-stem"
        )


def tried_size(model: ImageModel) -> tuple[int, int, int]:
    """Return (channels, height, width) of the image that a network from a file is tried with."""
    size = model.spec.input_size
    if size is None or max(size) > LARGEST_TRIED:
        return default_input_size(model.spec)
    return size


def check_runs(model: ImageModel) -> None:
    """Raise ModelError unless the network gives finite logits for one image, in one line.

    A network of no classes ends before a classifier; it has to run, whatever it gives.
    """
    image = torch.rand(1, *tried_size(model), generator=torch.Generator().manual_seed(0))
    try:
        with evaluating(model), torch.no_grad():
            logits = model(image)
    except RUN_ERRORS as error:
        raise ModelError(first_line(error)[:120]) from None
    if model.spec.num_classes == 0:
        return
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (1, model.spec.num_classes):
        raise ModelError(f"no logits of {model.spec.num_classes} classes come out")
    if not bool(logits.isfinite().all()):
        raise ModelError("its logits are not finite")
