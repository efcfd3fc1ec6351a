"""Trying on a copy, in float64, whether pruning a network's groups is the same as masking them."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robust_prune.errors import ModelError, first_line, out_of_memory
from robust_prune.graph.cutting import Remaining
from robust_prune.graph.example import Example
from robust_prune.graph.masking import silence_
from robust_prune.graph.stirring import stirred_copy
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
EXACT = 1e-9  # in float64, unless parts of the code compute in less; rounding alone is some 1e-15
QUICK = 1e-5  # in float32 where float64 has the last word; rounding is some 1e-7
LARGE = 10**8  # parameters; above, trials are in float32, and one copy is there at a time
SMALL = 10**5  # below, the few channels that are left may all be silent: several weights are tried
WEIGHTS = 3
# a draw in which, of widths that the code may take for one another, one stays whole
APART = 2
LEAST_APART = 0.1  # share of the channels; less can pass for rounding where attention is flat
RUN_ERRORS = (
    *(ModelError, RuntimeError, AssertionError, LookupError, ValueError, TypeError),
    *(ArithmeticError, AttributeError),
)
RANDOM = "its outputs differ from run to run in eval mode, so no trial says what pruning it does"


@dataclass(frozen=True)
class _Trial:
    """A network with other weights, or a few of them, to try on what pruning its groups does."""

    nets: tuple[nn.Module, ...]
    wiring: Wiring
    example: Example
    limit: float
    draw: int = 0
    again: Callable[[], nn.Module] | None = None  # makes the one net anew where memory is dear

    @uncollected()
    def problem(self, names: Sequence[str]) -> str | None:
        """Drop a part of these groups and return what goes wrong, or None."""
        dropped = {
            name: gone
            for name, gone in _draw(self.wiring, self.draw).items()
            if name in names and not (self.draw == APART and name in self.wiring.followers)
        }
        try:
            errors = [self._error(net, dropped) for net in self.nets]
        except RUN_ERRORS as fault:
            if out_of_memory(fault):
                raise
            line = first_line(fault)[:120]
            return f"the model does not run when it is pruned: {line}"
        for net, error in zip(self.nets, errors, strict=True):
            if not error < self.limit:
                if not difference(self.example.run(net), self.example.run(net)) < self.limit:
                    return RANDOM
                return f"pruning it is not the same as masking it (by {error:.1g})"
        return None

    def _error(self, net: nn.Module, dropped: Mapping[str, Tensor]) -> float:
        """Return how far what a pruned copy gives is from what a masked one gives."""
        pruned = self.again() if self.again else sharing(net)
        Remaining(self.wiring, pruned).remove_(dropped)
        found = self.example.run(pruned)
        if self.wiring.coupling.trains:
            with train_mode(pruned):
                self.example.paired().run(pruned)
        del pruned
        masked = self.again() if self.again else copied(net)
        silence_(masked, self.wiring, dropped)
        return difference(found, self.example.run(masked))


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
    size = _parameters(net)
    large = size > LARGE
    dtype = torch.float32 if large else torch.float64
    stir = functools.partial(stirred_copy, net, dtype)
    seeds = range(WEIGHTS if size < SMALL else 1)
    trial = _Trial(
        (net,) if large else tuple(map(stir, seeds)),
        wiring,
        example.to(dtype),
        TOLERANCES[dtype] if large else EXACT,
        again=stir if large else None,
    )
    if _is_right_at_once(trial):
        return wiring, ()
    if not large:
        trial = _as_exact_as_its_code(trial)
    found = _broken(trial)
    if not found:
        return wiring, ()
    ties = wiring.possible_ties(found)
    if ties:
        tied = wire(ties)
        still = _broken(replace(trial, wiring=tied))
        wider = tied.wider_ties(still)
        if wider:
            ties = (*ties, *wider)
            tied = wire(ties)
            still = _broken(replace(trial, wiring=tied))
        if len(tied.groups) - len(still) > 0 and tied.channels(still) > wiring.channels(found):
            return tied.without(still), ties
    return wiring.without(found), ()


def is_large(net: nn.Module) -> bool:
    """Whether copies in float64 are too much for memory."""
    return _parameters(net) > LARGE


def _parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def _is_right_at_once(trial: _Trial) -> bool:
    """Whether all groups together pass: the first draw as the trial says, the second in float32."""
    names = _returned_not(trial.wiring)
    if trial.problem(names) is not None:
        return False
    if not _are_apart(trial.wiring) and replace(trial, draw=APART).problem(names) is not None:
        return False
    if trial.again is not None:
        return replace(trial, draw=1).problem(names) is None
    if replace(_in_single(trial), draw=1, limit=QUICK).problem(names) is None:
        return True
    for net in trial.nets:
        net.double()
    return False


def _in_single(trial: _Trial) -> _Trial:
    """Return the trial in float32; its networks are converted in place."""
    for net in trial.nets:
        net.float()
    return replace(trial, example=trial.example.to(torch.float32))


def _as_exact_as_its_code(trial: _Trial) -> _Trial:
    """Return the trial in what the network's code can compute in, with the limit that suits it."""
    try:
        inexact = trial.example.computes_in_less(trial.nets[0])
    except RUN_ERRORS:  # float32 is part of its code
        return replace(_in_single(trial), limit=TOLERANCES[torch.float32])
    return replace(trial, limit=TOLERANCES[torch.float64]) if inexact else trial


def _broken(trial: _Trial) -> dict[str, str]:
    """Return the groups that can't be pruned by one of the draws, with what goes wrong."""
    broken: dict[str, str] = {}
    while True:
        before = len(broken)
        for draw in (0, 1, APART):
            left = trial.wiring.without(broken)
            found = _search(replace(trial, wiring=left, draw=draw))
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
