"""Trying on a copy, in float64, whether pruning a network's groups is the same as masking them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robust_prune.errors import ModelError, first_line, out_of_memory
from robust_prune.graph.cutting import Remaining
from robust_prune.graph.example import Example
from robust_prune.graph.masking import silence_
from robust_prune.graph.tracing import couple, train_mode
from robust_prune.graph.wiring import MIN_WIDTH, Wiring
from robust_prune.modules import (
    copied,
    difference,
    evaluating,
    release_memory,
    sharing,
    uncollected,
)

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
LARGE = 10**8  # parameters; above, trials are in float32, and one copy is there at a time
# a draw in which, of widths that the code may take for one another, one stays whole
APART = 2
LEAST_APART = 0.1  # share of the channels; less can pass for rounding where attention is flat
RUN_ERRORS = (
    *(ModelError, RuntimeError, AssertionError, LookupError, ValueError, TypeError),
    *(ArithmeticError, AttributeError),
)


@dataclass(frozen=True)
class _Trial:
    """A network with other weights, to try on what pruning its groups does."""

    net: nn.Module
    wiring: Wiring
    example: Example
    draw: int = 0
    again: Callable[[], nn.Module] | None = None  # makes `net` anew where memory is dear

    @uncollected()
    def problem(self, names: Sequence[str]) -> str | None:
        """Drop a part of these groups and return what goes wrong, or None."""
        dropped = {
            name: gone
            for name, gone in _draw(self.wiring, self.draw).items()
            if name in names and not (self.draw == APART and name in self.wiring.followers)
        }
        try:
            pruned = self.again() if self.again else sharing(self.net)
            Remaining(self.wiring, pruned).remove_(dropped)
            found = self.example.run(pruned)
            if self.wiring.coupling.trains:
                with train_mode(pruned):
                    self.example.paired().run(pruned)
            del pruned
            masked = self.again() if self.again else copied(self.net)
            silence_(masked, self.wiring, dropped)
            error = difference(found, self.example.run(masked))
        except RUN_ERRORS as fault:
            if out_of_memory(fault):
                raise
            line = first_line(fault)[:120]
            return f"the model does not run when it is pruned: {line}"
        if not error < TOLERANCES[self.example.dtype]:
            return f"pruning it is not the same as masking it (by {error:.1g})"
        return None


def wired(
    net: nn.Module,
    example: Example,
    *,
    protected: Mapping[str, str] | None = None,
    min_width: int = MIN_WIDTH,
    ties: Sequence[tuple[str, str]] = (),
    whole_heads: bool = False,
    outputs_stay: bool = True,
    probe: bool = True,
) -> tuple[Wiring, tuple[tuple[str, str], ...]]:
    """Trace a network, and try on a copy that pruning its groups does what masking them does.

    Args:
        net: left as it was, in mode and requires_grad.
        example: what it is run on.
        protected: why a layer's outputs must stay, by its dotted name.
        min_width: channels that every group keeps at least (fewer if it has fewer).
        ties: what an earlier probe found out.
        whole_heads: attentions lose whole heads.
        outputs_stay: the channels of what it returns can't be removed; others are not tried.
        probe: False trusts that every group can be pruned.

    Returns:
        The groups, and pairs of dimensions that the code couples without saying so.
    """

    def wire(ties: Sequence[tuple[str, str]]) -> Wiring:
        with evaluating(net), uncollected():
            pair = example.paired()
            coupling = couple(
                net,
                example.run,
                protected or {},
                ties,
                whole_heads,
                outputs_stay,
                (pair.run, pair.without_values().run),
            )
            return Wiring.of(net, coupling, min_width)

    traced = wire(ties)
    if not probe:
        return traced, tuple(ties)
    wiring, ties = probed(net, example, traced, wire)
    if is_large(net):
        release_memory()
    return replace(wiring, group_of=traced.group_of), ties


@torch.no_grad()
def probed(
    net: nn.Module,
    example: Example,
    wiring: Wiring,
    wire: Callable[[Sequence[tuple[str, str]]], Wiring],
) -> tuple[Wiring, tuple[tuple[str, str], ...]]:
    """Return the wiring of the groups for which pruning does what masking does, and its ties.

    Tried on a copy in float64 (float32 for more than `LARGE` parameters), all groups at once. Where
    that fails, the widths of attentions are tied to their inputs', as code that divides the one by
    the heads to know the other needs; culprits that are left are searched by halving.
    """
    dtype = torch.float32 if is_large(net) else torch.float64

    def stir() -> nn.Module:
        made = _in_type(net, dtype).eval()
        _randomize_(made)
        return made

    again = stir if is_large(net) else None
    stirred = net if again else stir()
    example = example.to(dtype)
    names = _returned_not(wiring)
    if _Trial(stirred, wiring, example, again=again).problem(names) is None:
        single = example.to(torch.float32)
        apart = _are_apart(wiring) or (
            _Trial(stirred, wiring, example, APART, again).problem(names) is None
        )
        if apart and _Trial(stirred.float(), wiring, single, 1, again).problem(names) is None:
            return wiring, ()
        stirred = stirred.to(dtype)
    if not again:
        try:
            example.run(stirred)
        except RUN_ERRORS:  # float32 is part of its code
            stirred, example = stirred.float(), example.to(torch.float32)
    found = _broken(stirred, wiring, example, again)
    if not found:
        return wiring, ()
    ties = wiring.possible_ties(found)
    if ties:
        tied = wire(ties)
        still = _broken(stirred, tied, example, again)
        wider = tied.wider_ties(still)
        if wider:
            ties = (*ties, *wider)
            tied = wire(ties)
            still = _broken(stirred, tied, example, again)
        if len(tied.groups) - len(still) > 0 and tied.channels(still) > wiring.channels(found):
            return tied.without(still), ties
    return wiring.without(found), ()


def _in_type(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy, converted as `net.to(dtype)` does, without a copy in between."""
    converted: dict[int, Tensor] = {}
    for tensor in (*net.parameters(), *net.buffers()):
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        twin = tensor.detach().to(kind, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        converted[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
    return copied(net, converted)


def is_large(net: nn.Module) -> bool:
    """Whether copies in float64 are too much for memory."""
    return sum(parameter.numel() for parameter in net.parameters()) > LARGE


def _broken(
    net: nn.Module, wiring: Wiring, example: Example, again: Callable[[], nn.Module] | None
) -> dict[str, str]:
    """Return the groups that can't be pruned by one of the draws, with what goes wrong."""
    broken: dict[str, str] = {}
    while True:
        before = len(broken)
        for draw in (0, 1, APART):
            left = wiring.without(broken)
            found = _search(_Trial(net, left, example, draw, again))
            for name, problem in found.items():
                # partners may be right when they are pruned together, and neither alone
                others = left.partners.get(name, ()) if draw == APART else ()
                broken |= dict.fromkeys((name, *others), problem)
        if len(broken) == before:  # what was right beside groups that are out by now is tried anew
            return broken


def _search(trial: _Trial) -> dict[str, str]:
    """Return the groups that can't be pruned, with what goes wrong.

    Groups of the same kind (their names differ in numbers alone) are tried together, then by
    halves; where the first and the last of a broken kind are broken, so are those between.
    """
    broken: dict[str, str] = {}
    good: list[str] = []

    def problem(names: Sequence[str]) -> str | None:
        found = trial.problem([*good, *names])
        if found is None:
            good.extend(names)
        elif len(names) == 1:
            broken[names[0]] = found
        return found

    def kinds_of(parts: list[list[str]]) -> None:
        if not parts or problem(list(itertools.chain(*parts))) is None:
            return
        if len(parts) > 1:
            kinds_of(parts[: len(parts) // 2])
            kinds_of(parts[len(parts) // 2 :])
        elif len(parts[0]) > 1:
            ends = [problem([name]) for name in (parts[0][0], parts[0][-1])]
            between = parts[0][1:-1]
            if all(ends):
                broken.update(dict.fromkeys(between, str(ends[0])))
            else:
                kinds_of([[name] for name in between])

    kinds: dict[str, list[str]] = {}
    for name in _returned_not(trial.wiring):
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    kinds_of(list(kinds.values()))
    return broken


def _returned_not(wiring: Wiring) -> list[str]:
    """Return the groups whose channels the network does not return: only they can be compared."""
    returned = {wiring.names.get(g) for g in wiring.coupling.outputs}
    return [group.name for group in wiring.groups if group.name not in returned]


def _draw(wiring: Wiring, draw: int) -> dict[str, Tensor]:
    """Return by group True [units] for those to drop, in the first or in another draw.

    The first drops some 30 to 70 % at random, the second what the first has kept, and no two
    groups of the same size lose equally many in both: code that takes one width for another shows.
    Where it is likely to (`Wiring.partners`), one group begins with few and the other with many.
    """
    found: dict[str, Tensor] = {}
    seen: dict[int, int] = {}
    for salt, group in enumerate(wiring.groups):
        units = group.units
        rank = seen[units] = seen.get(units, -1) + 1
        counts = list(range(max(1, round(0.3 * units)), max(2, round(0.7 * units) + 1)))
        counts = [min(n, units - 1) for n in counts]
        if group.name in wiring.followers:
            counts.reverse()
        order = torch.randperm(units, generator=torch.Generator().manual_seed(salt))
        if draw == 1:
            # from the other end: code that halves a width is right where one channel of four goes
            count = counts[-1 - (rank + rank // len(counts)) % len(counts)]
            order = order.flip(0)
        else:
            count = counts[rank % len(counts)]
        gone = torch.zeros(units, dtype=torch.bool)
        gone[order[:count]] = True
        found[group.name] = gone
    return found


def _are_apart(wiring: Wiring) -> bool:
    """Whether the first draw takes other shares of all widths that the code may confuse."""
    shares = {name: float(gone.double().mean()) for name, gone in _draw(wiring, 0).items()}
    return all(
        abs(shares[name] - shares[other]) >= LEAST_APART
        for name, others in wiring.partners.items()
        for other in others
    )


@torch.no_grad()
def _randomize_(net: nn.Module) -> None:
    """Give a copy weights under which no channel is silent and no branch or attention is flat."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if not tensor.is_floating_point():
            continue
        leaf = name.rpartition(".")[2]
        if isinstance(tensor, nn.Parameter) and tensor.ndim > 1:
            spread = float(tensor.std())
            if spread > 0 and math.isfinite(spread):
                tensor.mul_(max(tensor[0].numel(), 1) ** -0.5 / spread)
                continue
        cpu = torch.empty(tensor.shape, dtype=tensor.dtype)
        if leaf == "running_var":
            cpu.uniform_(0.5, 1.5, generator=generator)
        elif leaf == "running_mean" or leaf == "bias":
            cpu.normal_(0, 0.1, generator=generator)
        elif not isinstance(tensor, nn.Parameter):
            continue
        elif tensor.ndim > 1:
            cpu.normal_(0, max(tensor[0].numel(), 1) ** -0.5, generator=generator)
        else:
            cpu.uniform_(0.5, 1.5, generator=generator)
        tensor.copy_(cpu)
