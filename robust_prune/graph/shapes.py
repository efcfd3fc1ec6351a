"""From the shapes of a network that was pruned elsewhere to the numbers that follow them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from robust_prune.errors import ModelError
from robust_prune.graph.graph import ModelGraph
from robust_prune.graph.tracing import HEAD_NUMBERS
from robust_prune.modules import Fields, fields_of, network_of

logger = logging.getLogger(__name__)
Shapes = Mapping[str, torch.Size]


def numbers_at(
    dense: nn.Module, input_size: tuple[int, int, int], shapes: Shapes
) -> tuple[Fields, tuple[str, ...]]:
    """Return the numbers in modules that go with tensors of these shapes, and what is assumed.

    Shapes say how many channels each group lost, and the graph which numbers follow: the width of
    heads, the count of channels that a fixed kernel blurs. Numbers that are no counts, such as the
    scale of an attention, stay what they were in the network that was pruned. There are none where
    shapes leave the widths open.

    Args:
        dense: the network before; pruned by this.
        input_size: (channels, height, width) of its images.
        shapes: by the names of parameters and buffers.
    """
    try:
        graph = ModelGraph(dense, input_size)
    except ModelError as error:
        logger.info("numbers in modules stay as they are: %s", error)
        return {}, ()
    gone = units_gone(graph, shapes)
    if gone is None:
        return {}, ()
    net = network_of(dense)
    graph.dependency.remaining.remove_(
        {g.name: torch.arange(g.units) >= g.units - gone[g.name] for g in graph.groups}
    )
    now = net.state_dict()
    if any(now[name].shape != shape for name, shape in shapes.items() if name in now):
        return {}, ()
    found = {
        owner: {name: value for name, value in numbers.items() if not isinstance(value, float)}
        for owner, numbers in fields_of(net).items()
    }
    return found, _assumed(net, found)


def units_gone(graph: ModelGraph, shapes: Shapes) -> dict[str, int] | None:
    """Return by group how many of its units tensors of these shapes lack; None if unclear.

    A group that is alone along some dimension is known from it, others from what these leave.
    """
    net = network_of(graph.model)
    own = {n: t.shape for n, t in (*net.named_parameters(), *net.named_buffers())}
    lacks: dict[tuple[str, int], int] = {}
    shared: dict[tuple[str, int], dict[str, int]] = {}
    for group in graph.groups:
        for slot in graph.slots(group.name):
            if slot.tensor in shapes:
                axis = slot.tensor, slot.dim
                lacks[axis] = own[slot.tensor][slot.dim] - shapes[slot.tensor][slot.dim]
                shared.setdefault(axis, {})[group.name] = len(slot.indices) // group.units
    units = {group.name: group.units for group in graph.groups}
    gone: dict[str, int] = {}
    while True:
        before = len(gone)
        for axis, times in shared.items():
            rest = lacks[axis] - sum(n * gone.get(name, 0) for name, n in times.items())
            unknown = [name for name in times if name not in gone]
            if len(unknown) == 1:
                count, odd = divmod(rest, times[unknown[0]])
                if odd or not 0 <= count < units[unknown[0]]:
                    return None
                gone[unknown[0]] = count
            elif not unknown and rest:
                return None
        if len(gone) == before:
            return gone if len(gone) == len(units) else None


def _assumed(net: nn.Module, numbers: Fields) -> tuple[str, ...]:
    """Say that heads are narrower, where shapes leave open whether they are fewer."""
    modules = dict(net.named_modules())
    some = [owner for owner in numbers if vars(modules[owner]).keys() & set(HEAD_NUMBERS)]
    if not some:
        return ()
    beside = f" and of {len(some) - 1} more attentions" if len(some) > 1 else ""
    return (f"heads of {some[0]}{beside} are assumed to be narrower and as many as before",)
