"""Residual blocks that can go whole: which they are, and what is left of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robust_prune.errors import PlanError
from robust_prune.graph.costs import Counter, EmptyCost, TensorCost, WorkCost
from robust_prune.graph.masking import silence_, with_statistics
from robust_prune.graph.probing import EXACT, RUN_ERRORS
from robust_prune.graph.seen import Run, Seen, seen_in
from robust_prune.graph.tracing import Slot, adapted, name_of
from robust_prune.graph.wiring import Wiring
from robust_prune.modules import (
    TAILS,
    EmptyBlock,
    EmptyForm,
    copied,
    difference,
    evaluating,
    forget_fields_,
    put_in_,
    sharing,
)

IMAGES = 2  # that are passed: what a block adds must be the same for both
Slots = Mapping[str, Sequence[Slot]]


@dataclass(frozen=True)
class Block:
    """A residual block that can go whole: a module, and the groups that lie inside of it.

    Without all channels of these groups its branch gives the same for all images and positions;
    that was tried in float64. `cost` says what of the model's cost goes with it. `like` is the
    tensor whose rows are channels of the sum, "" where those all stay.
    """

    name: str
    groups: tuple[str, ...]
    form: EmptyForm
    cost: EmptyCost
    like: str


@torch.no_grad()
def find_blocks(net: nn.Module, wiring: Wiring, costs: WorkCost, run: Run) -> tuple[Block, ...]:
    """Return the blocks of a network that can go whole, in its order.

    Args:
        net: left as it was.
        wiring: its groups.
        costs: of its tensors and products, as a function of widths.
        run: passes `IMAGES` images through it.
    """
    inside = _groups_inside(net, wiring)
    seen = seen_in(net, inside, run)
    found: dict[str, Block] = {}
    for name in sorted(seen, key=lambda name: -name.count(".")):  # inner ones first
        if any(other.startswith(f"{name}.") for other in found):
            continue
        gone = {g: torch.ones(wiring.units(g), dtype=torch.bool) for g in inside[name]}
        try:
            empty = emptied(net.get_submodule(name), name, inside[name], wiring.slots, seen[name])
            masked = _masked(net, name, wiring, gone, seen[name].x.double())
        except RUN_ERRORS:
            continue
        if empty is None or not difference(empty(seen[name].x.double()), masked) < EXACT:
            continue
        cost, like = _cost_of(costs, name, inside[name], empty)
        if _counted(net, costs, cost, name, empty, seen[name].x, gone):
            found[name] = Block(name, inside[name], empty.form, cost, like)
    place = {name: i for i, (name, _) in enumerate(net.named_modules())}
    return tuple(sorted(found.values(), key=lambda block: place[block.name]))


@torch.no_grad()
def branch_sum(module: nn.Module, form: EmptyForm, x: Tensor) -> Tensor:
    """Return [C]: what a block's branch adds, averaged over positions and added over images.

    Args:
        module: the block; its hooks are not called.
        form: how it is put together.
        x: what it reads.
    """
    whole = next(read for tail, read in _gave(module.forward, x) if tail == form.tail)
    base = module.get_submodule(form.skip)(x.clone()) if form.skip else x
    rows = (whole - base).movedim(-1 if form.last else 1, 0).flatten(1)
    return rows.mean(1) * len(x)


@torch.no_grad()
def empty_blocks_(net: nn.Module, blocks: Sequence[Block], slots: Slots, run: Run) -> None:
    """Take the branches of blocks away, in place; what they give without their groups stays.

    Args:
        net: its groups inside of the blocks are whole, others may be cut.
        blocks: that go.
        slots: where the groups' channels are now.
        run: passes `IMAGES` images through the network.

    Raises:
        PlanError: a block gives more than that: its weights are others than when it was found.
    """
    seen = seen_in(net, {block.name: block.groups for block in blocks}, run)
    for block in blocks:
        module = net.get_submodule(block.name)
        here = seen.get(block.name)
        empty = None if here is None else emptied(module, block.name, block.groups, slots, here)
        if empty is None or empty.form != block.form:
            raise PlanError(
                f"block {block.name!r} can't go whole: without its channels it is not its skip "
                "and a constant; leave blocks alone (without --blocks)"
            )
        own = dict(module.named_children()).get(block.form.skip)
        constant = empty.constant.to(here.x)  # type: ignore[union-attr]
        put_in_(net, block.name, EmptyBlock(block.form, constant, own).train(module.training))
    forget_fields_(net)


def emptied(
    module: nn.Module, name: str, groups: Sequence[str], slots: Slots, seen: Seen
) -> EmptyBlock | None:
    """Return in float64 what is left of a block without these groups, if that is all it then does.

    Args:
        module: the block, left as it was.
        name: of the block in its network.
        groups: that lie inside of it.
        slots: where the groups' channels are.
        seen: what the block reads.
    """
    bare = copied(module).double()
    tensors = {**dict(bare.named_parameters()), **dict(bare.named_buffers())}
    for slot in (slot for group in groups for slot in slots[group]):
        tensor = tensors[slot.tensor.removeprefix(f"{name}.")]
        tensor.index_fill_(slot.dim, slot.indices.to(tensor.device), 0.0)
    x = seen.x.double()
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    gave = _gave(bare, x)
    children = {n: m for n, m in bare.named_children() if n in seen.children}
    for skip, aside in {"": None, **children}.items():
        for tail, before in gave:
            for last in (False, True):
                base = x if aside is None else aside(x.clone())
                constant = _constant(before, base, last)
                if constant is None:
                    continue
                empty = EmptyBlock(EmptyForm(skip, tail, last), constant, aside)
                if difference(empty(other.clone()), bare(other.clone())) < EXACT:
                    return empty
    return None


def _groups_inside(net: nn.Module, wiring: Wiring) -> dict[str, tuple[str, ...]]:
    """Return by module with parts of its own the groups whose channels lie all inside of it."""
    places = {name: {slot.layer for slot in slots} for name, slots in wiring.slots.items()}
    found: dict[str, tuple[str, ...]] = {}
    for name, module in net.named_modules():
        if name and any(True for _ in module.children()):
            groups = tuple(
                group
                for group, layers in places.items()
                if all(layer.startswith(f"{name}.") for layer in layers)
            )
            if groups:
                found[name] = groups
    return found


def _gave(module: Callable[[Tensor], Any], x: Tensor) -> list[tuple[str, Tensor]]:
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


def _masked(
    net: nn.Module, name: str, wiring: Wiring, gone: Mapping[str, Tensor], x: Tensor
) -> Tensor:
    """Return what a block gives while its groups are silent, as a masked network computes it."""
    twin = sharing(net)
    put_in_(twin, name, copied(net.get_submodule(name)).double())
    twin.eval()
    silence_(twin, wiring, gone)
    with with_statistics(twin):
        found: Tensor = twin.get_submodule(name)(x.clone())
    return found


def _cost_of(
    costs: WorkCost, name: str, groups: Sequence[str], empty: EmptyBlock
) -> tuple[EmptyCost, str]:
    """Return what goes with a block, all its tensors but its skip's, and what the constant is like.

    Like the last tensor whose rows can be channels of the sum.
    """
    kept = f"{name}.{empty.form.skip}." if empty.form.skip else "?"
    tensors = [t for t in costs.tensors if t.name.startswith(f"{name}.")]
    inside = frozenset(t.name for t in tensors if not t.name.startswith(kept))
    channels = empty.constant.numel()
    shares: tuple[tuple[int, str, int], ...] = ()
    like = ""
    for tensor in tensors:
        rows = tuple(share for share in tensor.shares if share[0] == 0)
        if rows and tensor.shape[0] == channels and not {g for _, g, _ in rows} & set(groups):
            shares, like = rows, tensor.name
    constant = TensorCost(f"{name}.constant", (channels,), shares, ())
    return EmptyCost(tuple(groups), inside, constant), like


def _counted(
    net: nn.Module,
    costs: WorkCost,
    cost: EmptyCost,
    name: str,
    empty: EmptyBlock,
    x: Tensor,
    gone: Mapping[str, Tensor],
) -> bool:
    """Return whether the multiply-adds that costs count for a block are all that it needs."""
    module = net.get_submodule(name)
    whole, skip = Counter(net.parameters()), Counter(net.parameters())
    with evaluating(module), adapted(module):
        with whole:
            module(x.clone())
        if empty.form.skip:
            with skip:
                module.get_submodule(empty.form.skip)(x.clone())
    units = {group: len(mask) for group, mask in gone.items()}
    return IMAGES * (costs.at({})[0] - costs.at(units, [cost])[0]) == whole.macs - skip.macs
