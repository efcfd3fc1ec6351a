"""Which layers stay whole, and why."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from robust_prune.graph.example import Example
from robust_prune.graph.wiring import Wiring
from robust_prune.modules import evaluating
from robust_prune.types import Unprunable


def left_whole(net: nn.Module, wiring: Wiring, example: Example) -> tuple[Unprunable, ...]:
    """Return what no group holds, with the reasons, in the network's order.

    Args:
        net: left as it was.
        wiring: of its groups.
        example: what it is run on, to tell layers that are not used from those that are not
            understood.
    """
    layers = [n for n, m in net.named_modules() if isinstance(m, (_ConvNd, nn.Linear))]
    seen = {slot.layer for slots in wiring.slots.values() for slot in slots}
    seen |= {item.name for item in wiring.unprunable}
    broken = wiring.group_of
    reasons = {n: f"goes with {broken[n]}" for n in layers if n not in seen and n in broken}
    reasons |= _why_unseen(net, [n for n in layers if n not in seen and n not in broken], example)
    place = {name: i for i, (name, _) in enumerate(net.named_modules()) if name}
    items = [*wiring.unprunable, *(Unprunable(name, why) for name, why in reasons.items())]
    return tuple(sorted(items, key=lambda item: place.get(item.name.split("@")[0], -1)))


def _why_unseen(net: nn.Module, names: Sequence[str], example: Example) -> dict[str, str]:
    """Return by layer why its channels were followed nowhere: it is not run, or otherwise."""
    ran: set[str] = set()
    handles = [
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.add(name))
        for name in names
    ]
    try:
        if names:
            with torch.no_grad(), evaluating(net):
                example.run(net)
    finally:
        for handle in handles:
            handle.remove()
    lost = "what it does with its channels can't be followed"
    return {name: lost if name in ran else "the forward pass does not use it" for name in names}
