"""A named network fitted to the widths of a file that was pruned elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from robust_prune.errors import ModelError
from robust_prune.models.fitting import check_runs, fill_, tried_size
from robust_prune.modules import Fields, ImageModel, fit_, set_fields_, sharing

Shapes = Mapping[str, torch.Size]
Follow = Callable[[nn.Module, tuple[int, int, int], Shapes], tuple[Fields, tuple[str, ...]]]


def narrower(net: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors with fewer channels than the network's, if that is all that differs."""
    own = net.state_dict()
    found = []
    for name, tensor in state.items():
        if name not in own or tensor.shape == own[name].shape:
            continue
        theirs, mine = tuple(tensor.shape), tuple(own[name].shape)
        if len(theirs) != len(mine) or any(a > b for a, b in zip(theirs, mine, strict=True)):
            return []
        learned = len(theirs) == 3 and theirs[:2] == mine[:2] and theirs[0] == 1  # tokens
        if min(theirs, default=0) == 0 or not (learned or theirs[2:] == mine[2:]):
            return []
        found.append(name)
    return found


def narrow_to_(
    model: ImageModel, path: Path, state: Mapping[str, Tensor], follow: Follow | None = None
) -> tuple[str, ...]:
    """Fit a named network to the widths of a file that was pruned elsewhere, and try it.

    Args:
        model: changed in place.
        path: of the file, for messages.
        state: what the file has.
        follow: for networks that don't run with new widths alone, gives the numbers in modules
            that go with them, and what it assumes, from the dense network, (channels, height,
            width) of an image, and shapes by name.

    Returns:
        What had to be assumed.

    Raises:
        ModelError: the network does not run with these widths.
    """
    dense = sharing(model)
    fit_(model.net, state)
    fill_(model.net, path, state)
    assumed: tuple[str, ...] = ()
    try:
        check_runs(model)
    except ModelError as error:
        try:
            if follow is not None:
                shapes = {name: tensor.shape for name, tensor in state.items()}
                numbers, assumed = follow(dense, tried_size(dense), shapes)
                set_fields_(model.net, numbers)
            check_runs(model)
        except ModelError:
            raise ModelError(
                f"{path}: pruned elsewhere, and {model.spec.arch} does not run with its widths "
                f"({error}); build the network as it was pruned: load(path, model=NETWORK)"
            ) from None
    return assumed
