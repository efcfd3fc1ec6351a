"""What is left of a residual block without its branch, found by running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robust_prune.graph.masking import zero_
from robust_prune.graph.probing import EXACT
from robust_prune.graph.seen import Seen
from robust_prune.graph.tracing import Slot, name_of
from robust_prune.modules import TAILS, EmptyBlock, EmptyForm, copied, difference

SCALES = (1.0, 10.0, 100.0)  # of inputs: some functions bite at large ones alone
Slots = Mapping[str, Sequence[Slot]]


def emptied(
    module: nn.Module, name: str, groups: Sequence[str], slots: Slots, seen: Seen
) -> EmptyBlock | None:
    """Return in float64 what is left of a block without these groups, if that is all it then does.

    How it is put together is found with other biases than its own: where those are zero, a
    constant could lie along any dimension.

    Args:
        module: the block, left as it was.
        name: of the block in its network.
        groups: that lie inside of it.
        slots: where the groups' channels are.
        seen: what the block reads.
    """
    bare, x = copied(module).double().eval(), seen.x.double()
    silence_block_(bare, name, groups, slots)
    stirred = copied(bare)
    generator = torch.Generator().manual_seed(0)
    for parameter in stirred.parameters():
        if parameter.ndim <= 1:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(drawn.to(parameter.device))
    silence_block_(stirred, name, groups, slots)
    readers = {slot.layer for g in groups for slot in slots[g] if slot.role == "in"}
    ends = [m for n, m in module.named_modules() if f"{name}.{n}" in readers]
    linear = bool(ends) and isinstance(ends[-1], nn.Linear)
    parts = {n: m for n, m in stirred.named_children() if n in seen.children}
    for skip in ("", *parts):
        base = parts[skip](x.clone()) if skip else x
        for tail, before in gave(stirred, x):
            for last in (linear, not linear):
                form = EmptyForm(skip, tail, last)
                if form.allowed and _constant(before, base, last) is not None:
                    return _with_form(bare, form, x)
    return None


def _with_form(bare: nn.Module, form: EmptyForm, x: Tensor) -> EmptyBlock | None:
    """Return what is left of a block that is put together like this, if it does the same."""
    skip = dict(bare.named_children()).get(form.skip)
    base = x if skip is None else skip(x.clone())
    read = next((before for tail, before in gave(bare, x) if tail == form.tail), None)
    constant = None if read is None else _constant(read, base, form.last)
    if constant is None:
        return None
    empty = EmptyBlock(form, constant, skip)
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    for scale in SCALES:
        if not difference(empty(scale * other), bare(scale * other)) < EXACT:
            return None
    return empty


def silence_block_(block: nn.Module, name: str, groups: Sequence[str], slots: Slots) -> None:
    """Set all that belongs to groups inside of a block to zero."""
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    for slot in (slot for group in groups for slot in slots[group]):
        zero_(tensors[slot.tensor.removeprefix(f"{name}.")], slot, slot.indices)


def gave(module: Callable[[Tensor], Any], x: Tensor) -> list[tuple[str, Tensor]]:
    """Return what a block gives, as (tail, what that is applied to)."""
    latest = _Latest()
    with latest:
        y = module(x.clone())
    found = [("", y)]
    if latest.name and latest.given is y:
        found.insert(0, (latest.name, latest.read))
    return found


class _Latest(TorchFunctionMode):
    """Remembers the latest activation that was computed: its name, what it read and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.read = self.given = torch.empty(0)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = name_of(func).rstrip("_")
        if name not in TAILS or not args or not isinstance(args[0], Tensor):
            return func(*args, **(kwargs or {}))
        read = args[0].clone()
        given = func(*args, **(kwargs or {}))
        self.name, self.read, self.given = name, read, given
        return given


def _constant(whole: Tensor, skip: Tensor, last: bool) -> Tensor | None:
    """Return [C], by which two tensors differ at every position, None if they differ by more."""
    if whole.shape != skip.shape or whole.ndim < 3 or (not last and whole.ndim != 4):
        return None
    rows = (whole - skip).movedim(-1 if last else 1, 0).flatten(1)
    spread = float((rows.amax(1) - rows.amin(1)).max())
    limit = EXACT * max(float(whole.abs().max()), float(skip.abs().max()))
    return rows[:, 0].clone() if spread <= limit else None
