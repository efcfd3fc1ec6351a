"""Scores for torch-pruning's rankings of which some channels stay, whatever a ranking asks for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robust_prune.errors import UsageError

STAYS = 1e4  # added to the scores of channels that stay; others are far below
LEAST_THAT_STAYS = STAYS / 100  # the mean over a layer's blocks may mix both
PASSING = {"cpu", "to", "view", "mean", "cat", "concat"}  # between an importance and a ranking


class Lowest(NamedTuple):
    """What `topk` returns."""

    values: Tensor
    indices: Tensor


class LimitedScores(Tensor):
    """Scores [channels] that torch-pruning's rankings can't push below what has to stay.

    A pruner takes the k lowest scores, and then all up to the highest of these: large scores alone
    bind until k reaches them. Here `topk` and `argsort` offer the channels that may go and no
    others, so that a ranking that asks for more takes all of them, and says so by a warning. What
    else is computed from these scores is a plain tensor.
    """

    groups: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: Tensor, group: str) -> LimitedScores:
        """Mark scores as those of a group; from `STAYS` on they are of channels that stay."""
        scores = values.as_subclass(cls)
        scores.groups = (group,)
        return scores

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", ""))
        with torch._C.DisableTorchFunctionSubclass():
            if name == "topk" and kwargs.get("largest") is False:
                return _lowest(args[0], kwargs.get("k", args[-1]))
            out = func(*args, **kwargs)
            if name == "argsort":
                may_go = int((args[0] < LEAST_THAT_STAYS).sum())
                return _Order.of(out[:may_go], args[0].groups)
            if name not in PASSING or not isinstance(out, Tensor):
                return out
            pieces = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            found = out.as_subclass(cls)
            found.groups = tuple(g for piece in pieces for g in getattr(piece, "groups", ()))
            return found


class _Order(Tensor):
    """Positions of channels that may go, lowest scores first; says when more are taken."""

    groups: tuple[str, ...] = ()

    @classmethod
    def of(cls, positions: Tensor, groups: tuple[str, ...]) -> _Order:
        order = positions.as_subclass(cls)
        order.groups = groups
        return order

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(getattr(func, "__name__", ""))
        with torch._C.DisableTorchFunctionSubclass():
            if name == "__getitem__" and isinstance(args[1], slice):
                asked = args[1].stop or 0
                if asked > len(args[0]):
                    _warn(
                        f"{_named(args[0].groups)} keeps more than round_to leaves of it: "
                        f"{len(args[0])} channels can go, not {asked}; give the importance the "
                        "pruner's round_to, and what stays is a multiple"
                    )
            return func(*args, **(kwargs or {}))


class _OfSeveral(Tensor):
    """Places in the ranking of several groups, which are no channels of any one of them."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise UsageError(
            "isomorphic=True ranks several groups together, and without global_pruning=True "
            "torch-pruning takes their places in that ranking for channels of each; add it"
        )


def _lowest(scores: LimitedScores, k: int) -> Lowest:
    """Return the k lowest scores of channels that may go, or all of these."""
    may_go = int((scores < LEAST_THAT_STAYS).sum())
    if k > may_go:
        _warn(
            f"{k} of the {len(scores)} channels of {_named(scores.groups)} were to go, {may_go} "
            "can: the others are the least that each group keeps of its dense width, or can't be "
            "removed"
        )
    plain = scores.as_subclass(Tensor)
    values, indices = torch.topk(plain, min(k, may_go), largest=False)
    if not len(values):
        values = plain.new_full((1,), -math.inf)  # the threshold that nothing lies under
    return Lowest(values, indices.as_subclass(_OfSeveral) if len(scores.groups) > 1 else indices)


def _named(groups: Sequence[str]) -> str:
    first = groups[0] if groups else "a group"
    return first if len(groups) < 2 else f"{first} and {len(groups) - 1} more groups"


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)
