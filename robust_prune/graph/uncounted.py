"""What a model computes beyond the multiply-adds that are counted, found by its kernels."""

from __future__ import annotations

import contextlib
import re
from collections import Counter as Tally
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from robust_prune.graph.costs import Counter, example_image
from robust_prune.graph.tracing import adapted
from robust_prune.modules import checked, evaluating, network_of

OWN = ("aten", "prim", "prims", "profiler", "rngprims")  # torch's own kernels
# products or more in torch's own kernels that nothing here, nor torch's counter, has a formula for
OTHER = re.compile(
    "_?fft_|_?linalg_(?!vector_norm|norm|cross|check)|_?cdist|_euclidean_dist|_?sparse_"
)


@torch.no_grad()
def uncounted_work(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[str, ...]:
    """Return one line for each module with work that `count_cost` leaves out.

    That is what kernels multiply and no torch function told of (scripted code), and kernels of
    other libraries, whose work nobody can tell. Adapters stand for their modules.

    Raises:
        ModelError: the network does not take such images.
    """
    net = network_of(model)
    owners: list[str] = [""]
    told, kernels = _Told(net, owners), _Kernels(owners)
    with checked(input_size), evaluating(net), adapted(net), _following(net, owners):
        image = example_image(net, input_size)
        with told, kernels:
            net(image)
    lines = []
    for owner in dict.fromkeys((*kernels.macs, *kernels.others)):
        where = f" in {owner}" if owner else ""
        missed = kernels.macs[owner] - told.by_owner[owner]
        if missed > 0:
            lines.append(f"not counted: {missed:,} multiply-adds{where}, out of the tracer's sight")
        for name in sorted(kernels.others.get(owner, ())):
            lines.append(f"not counted: the work of {name}{where}")
    return tuple(lines)


class _Told(Counter):
    """Multiply-adds by the module whose forward is running."""

    def __init__(self, net: nn.Module, owners: list[str]) -> None:
        super().__init__(net.parameters())
        self.by_owner: Tally[str] = Tally()
        self._owners = owners

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = self.macs
        out = super().__torch_function__(func, types, args, kwargs)
        self.by_owner[self._owners[-1]] += self.macs - before
        return out


class _Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What kernels multiply by torch's own formulas, and the names of those without one."""

    def __init__(self, owners: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: Tally[str] = Tally()
        self.others: dict[str, set[str]] = {}
        self._owners = owners

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet, owner = func._overloadpacket, self._owners[-1]
        name = packet.__name__
        if packet in flop_registry:
            formula = flop_registry[packet]
            self.macs[owner] += formula(*args, **(kwargs or {}), out_val=out) // 2
        elif func.namespace not in OWN:
            self.others.setdefault(owner, set()).add(f"{func.namespace}::{name}")
        elif OTHER.match(name):
            self.others.setdefault(owner, set()).add(name)
        return out


@contextlib.contextmanager
def _following(net: nn.Module, owners: list[str]) -> Iterator[None]:
    """Keep the last of `owners` the name of the module whose forward is running."""
    hooks = []
    for name, module in net.named_modules():

        def enter(module: nn.Module, inputs: Any, name: str = name) -> None:
            owners.append(name)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            owners.pop()

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
