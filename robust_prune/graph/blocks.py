"""Residual blocks that can go whole: which they are, and what is left of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_prune.errors import PlanError, out_of_memory
from robust_prune.graph.costs import Counter, EmptyCost, TensorCost, WorkCost
from robust_prune.graph.emptying import Slots, emptied, gave, silence_block_
from robust_prune.graph.masking import silence_, with_statistics
from robust_prune.graph.probing import EXACT, RUN_ERRORS, TOLERANCES
from robust_prune.graph.seen import Run, Seen, seen_in
from robust_prune.graph.tracing import adapted
from robust_prune.graph.wiring import Wiring
from robust_prune.modules import (
    EmptyBlock,
    EmptyForm,
    copied,
    difference,
    forget_fields_,
    put_in_,
    sharing,
)


@dataclass(frozen=True)
class Block:
    """A residual block that can go whole: a module, and the groups that lie inside of it.

    Without all channels of these groups its branch gives the same for all images and positions;
    that was tried in float64. `cost` says what of the model's cost goes with it. `like` is the
    tensor and its dimension that have the channels of the sum, None where those all stay.
    """

    name: str
    groups: tuple[str, ...]
    form: EmptyForm
    cost: EmptyCost
    like: tuple[str, int] | None


@torch.no_grad()
def find_blocks(net: nn.Module, wiring: Wiring, costs: WorkCost, run: Run) -> tuple[Block, ...]:
    """Return the blocks of a network that can go whole, in its order.

    Each is tried by itself, in float64 and with other biases, and then in its place: the network
    without its branch gives what the masked one gives, and costs what is counted.

    Args:
        net: left as it was.
        wiring: its groups.
        costs: of its tensors and products, as a function of widths.
        run: passes images through it.
    """
    inside = _groups_inside(net, wiring)
    seen = seen_in(net, inside, run)
    whole = copied(net).eval()
    found: dict[str, Block] = {}
    for name in sorted(seen, key=lambda name: -name.count(".")):  # inner ones first
        if any(other.startswith(f"{name}.") for other in found):
            continue
        try:
            block = _tried(net, whole, wiring, costs, name, inside[name], seen[name], run)
        except RUN_ERRORS as fault:
            if out_of_memory(fault):
                raise
            continue
        if block is not None:
            found[name] = block
    place = {name: i for i, (name, _) in enumerate(net.named_modules())}
    return tuple(sorted(found.values(), key=lambda block: place[block.name]))


def _tried(
    net: nn.Module,
    whole: nn.Module,
    wiring: Wiring,
    costs: WorkCost,
    name: str,
    groups: tuple[str, ...],
    seen: Seen,
    run: Run,
) -> Block | None:
    """Return the block of this name, None where it is more than its skip and a constant.

    `whole` is a copy of the network that may be written to, if it is then put back.
    """
    module = net.get_submodule(name)
    empty = emptied(module, name, groups, wiring.slots, seen)
    gone = {group: torch.ones(wiring.units(group), dtype=torch.bool) for group in groups}
    x = seen.x.double()
    if empty is None or not difference(empty(x), _masked(net, name, wiring, gone, x)) < EXACT:
        return None
    like = _like(wiring, groups)
    cost = None if like is None else _cost_of(costs, name, empty, like)
    if like is None or cost is None:
        return None
    twin = sharing(net).eval()
    own, form = twin.get_submodule(name), empty.empty_form
    put_in_(twin, name, EmptyBlock.of(own, form, empty.constant.to(seen.x)))
    with _silent(whole, name, groups, wiring.slots):
        masked = run(whole, 1)
    if not difference(run(twin, 1), masked) < TOLERANCES[torch.float32]:
        return None
    counter = Counter(twin.parameters())
    with adapted(twin), counter:
        run(twin, 1)
    counted = counter.macs, sum(p.numel() for p in twin.parameters())
    if counted != costs.at({group: len(units) for group, units in gone.items()}, [cost]):
        return None
    return Block(name, groups, form, cost, like or None)


@torch.no_grad()
def branch_sum(module: nn.Module, form: EmptyForm, x: Tensor) -> Tensor:
    """Return [C]: what a block's branch adds, averaged over positions and added over images.

    Args:
        module: the block; its hooks are not called.
        form: how it is put together.
        x: what it reads.
    """
    whole = next(read for tail, read in gave(module.forward, x) if tail == form.tail)
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
        run: passes images through the network.

    Raises:
        PlanError: a block gives more than that.
    """
    seen = seen_in(net, {block.name: block.groups for block in blocks}, run)
    for block in blocks:
        module = net.get_submodule(block.name)
        here = seen.get(block.name)
        empty = None if here is None else emptied(module, block.name, block.groups, slots, here)
        if here is None or empty is None or empty.empty_form != block.form:
            raise PlanError(
                f"block {block.name!r} can't go whole: without its channels it is not its skip "
                "and a constant; leave blocks alone (--no-blocks)"
            )
        constant = empty.constant.to(here.x)
        put_in_(net, block.name, EmptyBlock.of(module, block.form, constant))
    forget_fields_(net)


@contextmanager
def _silent(net: nn.Module, name: str, groups: Sequence[str], slots: Slots) -> Iterator[None]:
    """Set the groups inside of a block to zero for a while, in a network with its own storage."""
    block = net.get_submodule(name)
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    try:
        silence_block_(block, name, groups, slots)
        yield
    finally:
        for key, tensor in before.items():
            tensors[key].copy_(tensor)


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


def _like(wiring: Wiring, groups: Sequence[str]) -> tuple[str, int] | tuple[()] | None:
    """Return a tensor and its dimension that have the channels which a branch is added to.

    Those are what the layers make that read the groups inside of it, but for these groups. Empty
    where they are in no group and all stay, None where they are in several.
    """
    ends = {slot.tensor for g in groups for slot in wiring.slots[g] if slot.role == "in"}
    found = {
        group: (slot.tensor, slot.dim)
        for group, slots in wiring.slots.items()
        for slot in slots
        if slot.role == "out" and slot.tensor in ends and group not in groups
    }
    if len(found) > 1:
        return None
    return next(iter(found.values()), ())


def _cost_of(
    costs: WorkCost,
    name: str,
    empty: EmptyBlock,
    like: tuple[str, int] | tuple[()],
) -> EmptyCost | None:
    """Return what goes with a block, all its tensors but its skip's, and the constant that comes.

    None where the constant has other channels than what it is said to be like.
    """
    kept = f"{name}.{empty.empty_form.skip}." if empty.empty_form.skip else "?"
    tensors = {t.name: t for t in costs.tensors if t.name.startswith(f"{name}.")}
    inside = frozenset(n for n in tensors if not n.startswith(kept))
    channels = empty.constant.numel()
    shares: tuple[tuple[int, str, int], ...] = ()
    if like:
        tensor, dim = tensors[like[0]], like[1]
        if tensor.shape[dim] != channels:
            return None
        shares = tuple((0, group, each) for d, group, each in tensor.shares if d == dim)
    return EmptyCost(inside, TensorCost(f"{name}.constant", (channels,), shares, ()))
