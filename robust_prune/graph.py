"""torch-pruning's dependency graph as plain channel groups with exact costs, and `prune_`."""

from __future__ import annotations

import copy
import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from robust_prune.costs import (
    count_cost,
    describe,
    example_image,
    output_positions,
    own_params,
    weight_of,
)
from robust_prune.errors import ModelError, PlanError, UsageError
from robust_prune.modules import (
    evaluating,
    make_contiguous_,
    network_of,
    requires_grad,
)
from robust_prune.types import ChannelGroup, Cost, PruningPlan, Unprunable

Side = Literal["out", "in"]
MIN_WIDTH = 2


@dataclass(frozen=True)
class Member:
    """One layer's share in a group: its channels [n] and the unit [n] each one belongs to."""

    module: nn.Module
    name: str
    side: Side
    channels: Tensor
    units: Tensor

    @property
    def is_weighted(self) -> bool:
        """Whether it is a convolution or linear layer, whose weights mix channels."""
        return isinstance(self.module, (_ConvNd, nn.Linear))

    def sum_by_unit(self, values: Tensor, units: int) -> Tensor:
        """Sum a weight-shaped tensor over everything but this member's channels, by unit.

        Returns float64 [units] on the CPU: sums of rows on the output side, of columns on the
        input side.
        """
        dim = 0 if (self.side == "out") != isinstance(self.module, _ConvTransposeNd) else 1
        sums = values.sum([d for d in range(values.ndim) if d != dim]).double().cpu()
        # a grouped convolution stores the input columns of one block, for all blocks alike
        stored = self.channels < len(sums)
        total = torch.zeros(units, dtype=torch.float64)
        return total.index_add_(0, self.units[stored], sums[self.channels[stored]])


class ModelGraph:
    """The groups of a model, what they cost, and how to remove their channels in place.

    Built once; every question about costs is then answered without touching the model.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: tuple[int, int, int],
        *,
        protect: Sequence[str] = (),
        min_width: int = MIN_WIDTH,
        probe: bool = True,
    ) -> None:
        """Trace the model, and try on a copy that it still runs when its groups are halved.

        Args:
            model: any module on images; left as it was, in mode and requires_grad.
            input_size: (channels, height, width) that costs are counted at.
            protect: dotted layer names or patterns such as `layer1.*` that must stay whole.
            min_width: channels that every group keeps at least (fewer if it has fewer).
            probe: False trusts that every group can be pruned, which costs half the time.

        Raises:
            ModelError: the model does not take such images or can't be traced.
            UsageError: a name in `protect` matches no layer.
        """
        self.model = model
        self.input_size = input_size
        net = network_of(model)
        self._names = {module: name for name, module in net.named_modules()}
        for module in self._names:
            if isinstance(module, (_ConvNd, nn.Linear)):
                weight_of(module)  # refuses weights that are computed from others
        self._protected = _match(protect, [n for n in self._names.values() if n])
        self._positions = output_positions(net, input_size)
        self._dg = _trace(net, input_size)
        self._members: dict[str, tuple[Member, ...]] = {}
        groups, unprunable = self._enumerate(min_width)
        self.groups: tuple[ChannelGroup, ...] = tuple(groups)
        self.unprunable: tuple[Unprunable, ...] = tuple(unprunable)
        self._roots = {name: module for module, name in self._names.items()}
        if probe:
            self._probe()
        self._layers = {
            name: describe(module, self._positions.get(module, 0))
            for module, name in self._names.items()
            if own_params(module)
        }
        self._shares = self._collect_shares()

    def members(self, group: str) -> tuple[Member, ...]:
        """Return the layers of a group with the channels each one shares in it."""
        return self._members[group]

    def cost(self, widths: Mapping[str, int] | None = None) -> Cost:
        """Return the exact cost when groups have these widths; missing ones stay whole."""
        widths = widths or {}
        macs = params = 0
        for name, layer in self._layers.items():
            out_channels, in_channels = layer.out_channels, layer.in_channels
            for group, side, count in self._shares.get(name, ()):
                width, full = widths.get(group.name, group.width), group.width
                removed = count * (full - width) // full
                if side == "out":
                    out_channels -= removed
                else:
                    in_channels -= removed
            layer_macs, layer_params = layer.cost(out_channels, in_channels)
            macs, params = macs + layer_macs, params + layer_params
        channels = sum(widths.get(group.name, group.width) for group in self.groups)
        return Cost(macs, params, channels)

    def check(self, plan: PruningPlan) -> None:
        """Raise PlanError unless every group of `plan` is one of this model's."""
        known = {group.name: group for group in self.groups}
        widths: dict[str, int] = {}
        for item in plan.groups:
            group = known.get(item.name)
            if group is None:
                raise PlanError(
                    f"the plan prunes {item.name!r}, which is no prunable group of this model "
                    f"({len(known)} groups); was it made for another network?"
                )
            if group.width != item.width:
                raise PlanError(
                    f"the plan expects {item.width} channels in {item.name!r}, this model has "
                    f"{group.width}; was it already pruned?"
                )
            units = {i % group.units for i in item.keep}
            widths[item.name] = item.keep_width
            if len(units) * group.blocks != len(item.keep):
                raise PlanError(
                    f"the plan keeps channels of {item.name!r} that a grouped convolution of "
                    f"{group.blocks} blocks can't keep apart"
                )
        for what, mine, theirs in (
            ("dense", self.cost(), plan.dense),
            ("pruned", self.cost(widths), plan.pruned),
        ):
            if (mine.macs, mine.params) != (theirs.macs, theirs.params):
                raise PlanError(
                    f"the plan says {theirs.macs:,} multiply-adds and {theirs.params:,} parameters "
                    f"for the {what} model, this one has {mine.macs:,} and {mine.params:,}; was it "
                    "made for another network or image size, or edited by hand?"
                )

    def apply_(self, plan: PruningPlan) -> None:
        """Remove the channels that `plan` drops, in place. The graph is spent afterwards.

        Raises:
            PlanError: the plan does not fit; the model is untouched.
            ModelError: the model does not run after pruning, although each group was tried.
        """
        self.check(plan)
        net = network_of(self.model)
        trainable = {name: p.requires_grad for name, p in net.named_parameters()}
        for item in plan.groups:
            kept = set(item.keep)
            self._remove(item.name, [i for i in range(item.width) if i not in kept])
        for name, parameter in net.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(trainable[name])
        make_contiguous_(net)
        counted = count_cost(self.model, plan.input_size)
        if (counted.macs, counted.params) != (plan.pruned.macs, plan.pruned.params):
            raise PlanError(
                f"the pruned model has {counted.macs:,} multiply-adds and {counted.params:,} "
                f"parameters, the plan promised {plan.pruned.macs:,} and {plan.pruned.params:,}"
            )

    def _remove(self, group: str, drop: Sequence[int]) -> None:
        if drop:
            root = self._roots[group]
            function = self._dg.get_pruner_of_module(root).prune_out_channels
            self._dg.get_pruning_group(root, function, list(drop)).prune()

    def _probe(self) -> None:
        """Halve all groups of a copy; if it breaks, halve each alone and leave out what breaks."""
        if _survives(self.model, self.input_size, [g.name for g in self.groups]) is None:
            return
        broken = {}
        for group in self.groups:
            reason = _survives(self.model, self.input_size, [group.name])
            if reason is not None:
                broken[group.name] = f"the model does not run when it is pruned: {reason}"
        self.groups = tuple(g for g in self.groups if g.name not in broken)
        self._members = {g.name: self._members[g.name] for g in self.groups}
        self.unprunable += tuple(Unprunable(name, reason) for name, reason in broken.items())

    def _enumerate(self, min_width: int) -> tuple[list[ChannelGroup], list[Unprunable]]:
        order = {name: i for i, name in enumerate(self._names.values())}
        groups: list[ChannelGroup] = []
        unprunable: list[Unprunable] = []
        for tp_group in self._dg.get_all_groups(ignored_layers=[]):
            tp_group = self._with_first_root(tp_group, order)
            name = self._names[tp_group[0].dep.target.module]
            reason = self._why_not(tp_group)
            if reason is None:
                group, members = self._translate(name, tp_group, min_width)
                reason = _why_uneven(group, members)
            if reason is None:
                groups.append(group)
                self._members[name] = members
            else:
                unprunable.append(Unprunable(name, reason))
        seen = {m.name for members in self._members.values() for m in members}
        seen |= {item.name for item in unprunable}
        for module, name in self._names.items():
            if isinstance(module, (_ConvNd, nn.Linear)) and name not in seen:
                unprunable.append(Unprunable(name, "not reached by the dependency graph"))
        groups.sort(key=lambda group: order[group.name])
        unprunable.sort(key=lambda item: order[item.name])
        return groups, unprunable

    def _with_first_root(self, tp_group: Any, order: Mapping[str, int]) -> Any:
        """Return the group seen from its first layer in the model's own order, if that is exact."""
        roots = [
            dep.target.module
            for dep, idxs in tp_group
            if isinstance(dep.target.module, (_ConvNd, nn.Linear))
            and self._dg.is_out_channel_pruning_fn(dep.handler)
            and list(idxs) == list(range(len(tp_group[0].idxs)))
        ]
        if not roots:
            return tp_group
        first = min(roots, key=lambda module: order[self._names[module]])
        if first is tp_group[0].dep.target.module:
            return tp_group
        function = self._dg.get_pruner_of_module(first).prune_out_channels
        return self._dg.get_pruning_group(first, function, range(len(tp_group[0].idxs)))

    def _why_not(self, tp_group: Any) -> str | None:
        for dep, idxs in tp_group:
            module = dep.target.module
            if isinstance(module, nn.Parameter):
                return "touches a parameter that belongs to no layer"
            if self._dg.is_out_channel_pruning_fn(dep.handler) and not dep.target.outputs:
                return "its channels are the model's outputs"
            name = self._names.get(module)
            if name is None:
                continue
            if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
                return f"{name} normalises over more than the channels"
            if name in self._protected and self._dg.is_out_channel_pruning_fn(dep.handler):
                return f"protected: {name}"
            limit = self._channels(module, self._side(dep))
            if idxs and (max(idxs) >= limit or min(idxs) < 0):
                return f"couples more channels than {name} has"
        return None

    def _translate(
        self, name: str, tp_group: Any, min_width: int
    ) -> tuple[ChannelGroup, tuple[Member, ...]]:
        width = len(tp_group[0].idxs)
        blocks = max(
            (_blocks(dep.target.module) for dep, _ in tp_group),
            default=1,
        )
        units = max(1, width // blocks)
        members = tuple(
            Member(
                module=module,
                name=self._names[module],
                side=self._side(item.dep),
                channels=torch.tensor(list(item.idxs)),
                units=torch.tensor(list(item.root_idxs)) % units,
            )
            for item in tp_group.items
            if (module := item.dep.target.module) in self._names and own_params(module)
        )
        group = ChannelGroup(
            name=name,
            width=width,
            blocks=blocks,
            min_width=min(width, max(min_width, blocks)),
            members=tuple(m.name for m in members if m.side == "out"),
            readers=tuple(m.name for m in members if m.side == "in"),
        )
        return group, members

    def _side(self, dep: Any) -> Side:
        return "out" if self._dg.is_out_channel_pruning_fn(dep.handler) else "in"

    def _channels(self, module: nn.Module, side: Side) -> int:
        ask = self._dg.get_out_channels if side == "out" else self._dg.get_in_channels
        return int(ask(module) or 0)

    def _collect_shares(self) -> dict[str, list[tuple[ChannelGroup, Side, int]]]:
        shares: dict[str, list[tuple[ChannelGroup, Side, int]]] = {}
        for group in self.groups:
            for member in self._members[group.name]:
                shares.setdefault(member.name, []).append(
                    (group, member.side, len(member.channels))
                )
        return shares


def _survives(
    model: nn.Module, input_size: tuple[int, int, int], names: Sequence[str]
) -> str | None:
    """Halve these groups of a copy of the model; return why it fails, or None."""
    graph = ModelGraph(copy.deepcopy(model), input_size, probe=False)
    try:
        for group in graph.groups:
            if group.name in names and group.units > 1:
                half = group.units // 2
                graph._remove(group.name, [i for i in range(group.width) if i % group.units < half])
        output_positions(network_of(graph.model), input_size)
    except (ModelError, RuntimeError, AssertionError, IndexError, ValueError) as error:
        return str(error).removeprefix("the model does not take a ").splitlines()[0][:120]
    return None


def prune_(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Remove the channels that `plan` drops from `model`, in place, and return it.

    Build optimizers afterwards: the parameters are new objects.

    Raises:
        PlanError: the plan was made for another network; the model is then untouched.
    """
    ModelGraph(model, plan.input_size, probe=False).apply_(plan)
    return model


@torch.no_grad()
def mask_(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Zero in place what reads the channels that `plan` drops: same outputs as pruning, full size.

    Exact where no normalisation spans pruned channels (batch norm does not).
    """
    graph = ModelGraph(model, plan.input_size, probe=False)
    graph.check(plan)
    for item in plan.groups:
        dropped = torch.tensor(sorted(set(range(item.width)) - set(item.keep)), dtype=torch.long)
        units = next(g.units for g in graph.groups if g.name == item.name)
        for member in graph.members(item.name):
            if member.side == "in" and member.is_weighted:
                weight = weight_of(member.module)
                gone = torch.isin(member.units, dropped % units)
                columns = member.channels[gone] % weight.shape[1]
                weight.index_fill_(1, torch.unique(columns).to(weight.device), 0.0)
    return model


def _match(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
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
            raise UsageError(f"protect: no layer is called {pattern!r}{hint}")
        found.update(hits)
    return found


def _trace(net: nn.Module, input_size: tuple[int, int, int]) -> Any:
    example = example_image(net, input_size).requires_grad_(True)
    try:
        with evaluating(net), requires_grad(net, True), torch.enable_grad():
            return tp.DependencyGraph().build_dependency(
                net, example, customized_pruners=_layer_norm_pruners(net), verbose=False
            )
    except Exception as error:
        line = (str(error).splitlines() or [""])[0][:160]
        raise ModelError(
            f"the dependency graph of {type(net).__name__} can't be built: "
            f"{type(error).__name__}: {line}"
        ) from error


class _LayerNormPruner(tp.pruner.function.BasePruningFunc):  # type: ignore[misc]
    """torch-pruning 1.6.1's own sorts the kept indices without keeping the result."""

    TARGET_MODULES = nn.LayerNorm

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        assert isinstance(layer, nn.LayerNorm)
        gone = set(idxs)
        keep = [i for i in range(layer.normalized_shape[-1]) if i not in gone]
        if layer.elementwise_affine:
            layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 0)
            if layer.bias is not None:
                layer.bias = self._prune_parameter_and_grad(layer.bias, keep, 0)
        layer.normalized_shape = (len(keep),)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> int:
        assert isinstance(layer, nn.LayerNorm)
        return int(layer.normalized_shape[-1])

    get_in_channels = get_out_channels


def _layer_norm_pruners(net: nn.Module) -> dict[type[nn.Module], _LayerNormPruner]:
    """One entry per exact class, the way torch-pruning looks them up."""
    classes = {type(module) for module in net.modules() if isinstance(module, nn.LayerNorm)}
    return {cls: _LayerNormPruner() for cls in classes}


def _blocks(module: nn.Module) -> int:
    """Return how many blocks of channels a layer treats alike; depthwise layers have none."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    if isinstance(module, _ConvNd) and not (
        module.groups == module.out_channels == module.in_channels
    ):
        return module.groups
    return 1


def _why_uneven(group: ChannelGroup, members: Iterable[Member]) -> str | None:
    """Say why a group's cost would depend on which channels go, if it does."""
    if group.width % group.blocks:
        return f"{group.width} channels don't divide into {group.blocks} blocks"
    for member in members:
        module = member.module
        if isinstance(module, _ConvNd) and module.groups > 1:
            whole = module.out_channels if member.side == "out" else module.in_channels
            if len(member.channels) != whole:
                return f"meets only a part of the grouped convolution {member.name}"
        counts = torch.bincount(member.units, minlength=group.units)
        if len(counts) != group.units or int(counts.min()) != int(counts.max()):
            return f"its channels meet those of {member.name} unevenly"
    if not any(m.side == "in" and m.is_weighted for m in members):
        return "no layer reads its channels"
    return None
