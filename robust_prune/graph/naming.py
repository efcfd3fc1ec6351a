"""Layers by the patterns that people write."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from robust_prune.errors import UsageError
from robust_prune.types import ChannelGroup, Unprunable


def matching(patterns: Sequence[str], names: Sequence[str], option: str) -> set[str]:
    """Return the names that patterns such as `layer1.*` match, and all that lie inside of them.

    Raises:
        UsageError: a pattern matches nothing; `option` says where it was given.
    """
    found: set[str] = set()
    for pattern in patterns:
        hits = [
            name
            for name in names
            if fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
        ]
        if not hits:
            close = difflib.get_close_matches(pattern, names, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise UsageError(f"{option}: no layer is called {pattern!r}{hint}")
        found.update(hits)
    return found


def staying(
    net: nn.Module, protect: Sequence[str] = (), only: Sequence[str] = ()
) -> dict[str, str]:
    """Return by module why its channels stay: what `protect` matches, and what `only` does not.

    A pattern means the outputs of the convolutions, linear layers and attentions that it matches.
    Where `protect` matches none of them, it means the channels that norms have weights for.

    Raises:
        UsageError: a pattern matches nothing, or nothing that has channels.
    """
    modules = {name: module for name, module in net.named_modules() if name}
    kinds = _ConvNd, nn.Linear, nn.MultiheadAttention
    layers = {name for name, module in modules.items() if isinstance(module, kinds)}
    chosen = set[str]()
    for pattern in protect:
        hits = matching([pattern], list(modules), "protect")
        weighted = {n for n in hits if any(True for _ in modules[n].parameters(recurse=False))}
        if not weighted:
            raise UsageError(
                f"protect: {pattern!r} has no weights, so that no channels are its own; name a "
                "convolution, a linear layer, an attention or a norm"
            )
        chosen |= hits & layers or weighted
    allowed = set[str]()
    for pattern in only:
        hits = matching([pattern], list(modules), "only") & layers
        if not hits:
            raise UsageError(
                f"only: {pattern!r} makes no channels; name a convolution, a linear layer or an "
                "attention"
            )
        allowed |= hits
    others = layers - allowed if only else set[str]()
    return {
        name: f"protected: {name}" if name in chosen else f"{name} is not among those to prune"
        for name in modules
        if name in chosen | others
    }


def ratios_by_group(
    ratios: Mapping[str, float],
    names: Sequence[str],
    groups: Sequence[ChannelGroup],
    unprunable: Sequence[Unprunable],
) -> dict[str, float]:
    """Return by group the share of its channels that its layers are asked to lose.

    Layers of a group lose channels together, so that one that matches decides for all.

    Args:
        ratios: shares by pattern.
        names: of all modules.
        groups: of the network.
        unprunable: what stays whole, and why.

    Raises:
        UsageError: a pattern matches no layer or none that can lose channels, or two patterns ask
            for different shares of one group.
    """
    asked: dict[str, tuple[float, str]] = {}
    for pattern, ratio in ratios.items():
        layers = matching((pattern,), names, "ratio of")
        hit = [group for group in groups if layers & {group.name, *group.members}]
        if not hit:
            why = next((f": {i.name}: {i.reason}" for i in unprunable if i.name in layers), "")
            raise UsageError(f"ratio of {pattern!r}: none of these layers can lose channels{why}")
        for group in hit:
            before, by = asked.setdefault(group.name, (ratio, pattern))
            if before != ratio:
                raise UsageError(
                    f"ratio of: {by!r} asks for {before:g} and {pattern!r} for {ratio:g} of the "
                    f"channels that layers of group {group.name} lose together"
                )
    return {name: ratio for name, (ratio, _) in asked.items()}
