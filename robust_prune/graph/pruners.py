"""Giving this graph to torch-pruning's pruners, for the time of a `with`."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch_pruning as tp

from robust_prune.errors import UsageError
from robust_prune.graph.dependency import DependencyGraph

# torch-pruning's defaults for these are dictionaries that all pruners write to and share
DICTIONARIES = ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups")


@contextlib.contextmanager
def dependency_graph(*, prune_outputs: bool = False, probe: bool = True) -> Iterator[None]:
    """Let torch-pruning's pruners that are made inside use this package's graph.

    `BasePruner`, `GroupNormPruner`, `BNScalePruner`, `GrowingRegPruner` and classes derived from
    them; they keep the graph afterwards, and nothing stays changed.

        with robust_prune.dependency_graph():
            pruner = tp.pruner.BasePruner(model, images, importance=importance)
        pruner.step()

    All their options work. Attentions need no `num_heads`; with them and `prune_num_heads=True,
    prune_head_dims=False` whole heads go.

    Args:
        prune_outputs: offer the channels that the network returns, too; otherwise the classifier
            keeps its classes whether it is in `ignored_layers` or not.
        probe: False trusts that every group can be pruned, which costs half the time.

    Raises:
        UsageError: from a pruner, for options that would prune what was not asked.
    """
    base, graphs = tp.pruner.BasePruner, tp.dependency
    original, theirs = base.__init__, graphs.DependencyGraph
    signature = inspect.signature(original)

    @functools.wraps(original)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        asked = signature.bind(self, *args, **kwargs)
        asked.apply_defaults()
        options = asked.arguments
        for name in DICTIONARIES:
            if any(options[name] is default for default in _defaults(type(self), name)):
                options[name] = {}
        _check_options(options)
        graphs.DependencyGraph = functools.partial(
            DependencyGraph,
            whole_heads=options["prune_num_heads"] and not options["prune_head_dims"],
            prune_outputs=prune_outputs,
            probe=probe,
        )
        try:
            original(*asked.args, **asked.kwargs)
        finally:
            graphs.DependencyGraph = theirs
        _check_ratios(self, options["pruning_ratio_dict"] or {})

    base.__init__ = made
    try:
        yield
    finally:
        base.__init__ = original


def _defaults(cls: type, name: str) -> Iterator[Any]:
    """Yield the defaults that a pruner's class and its bases have for a parameter."""
    for each in cls.__mro__:
        if "__init__" in vars(each):
            parameter = inspect.signature(vars(each)["__init__"]).parameters.get(name)
            if parameter is not None and parameter.default is not parameter.empty:
                yield parameter.default


def _check_options(options: dict[str, Any]) -> None:
    if options["isomorphic"] and not options["global_pruning"]:
        raise UsageError(
            "isomorphic=True ranks groups of one shape together, which needs global_pruning=True"
        )
    heads = options["head_pruning_ratio"] or options["head_pruning_ratio_dict"]
    if options["prune_num_heads"] and options["prune_head_dims"] and heads:
        raise UsageError(
            "whole heads and dims of heads can't go at once; add prune_head_dims=False, and prune "
            "the dims by another pruner afterwards"
        )
    if options["prune_num_heads"] and heads and not options["num_heads"]:
        raise UsageError(
            "prune_num_heads=True needs num_heads={layer: heads} to know which groups are heads"
        )


def _check_ratios(pruner: Any, asked: dict[Any, Any]) -> None:
    """Refuse two ratios for one group: torch-pruning would take the first it finds."""
    if len(asked) < 2:
        return
    for group in pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types):
        found: dict[float, str] = {}
        for dep, _ in group:
            ratios = pruner.pruning_ratio_dict.get(dep.target.module)
            if ratios is not None and pruner.DG.is_out_channel_pruning_fn(dep.handler):
                found.setdefault(ratios[-1], dep.target.name)
        if len(found) > 1:
            (one, first), (two, second) = list(found.items())[:2]
            raise UsageError(
                f"pruning_ratio_dict asks for {one} in {first} and {two} in {second}, which lose "
                "the same channels; name one of them"
            )
