"""The prunable groups of a model, with exact costs."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from robust_prune.errors import PlanError
from robust_prune.graph.blocks import Block, empty_blocks_, find_blocks
from robust_prune.graph.costs import EmptyCost, count_cost, example_image, weight_of
from robust_prune.graph.counting import check_counts, work_cost
from robust_prune.graph.cutting import Remaining
from robust_prune.graph.dependency import DependencyGraph
from robust_prune.graph.example import Example
from robust_prune.graph.items import Group
from robust_prune.graph.left_whole import left_whole
from robust_prune.graph.masking import silence_
from robust_prune.graph.naming import ratios_by_group, staying
from robust_prune.graph.probing import wired
from robust_prune.graph.seen import passing
from robust_prune.graph.tracing import Slot
from robust_prune.graph.uncounted import uncounted_work
from robust_prune.graph.wiring import MIN_WIDTH
from robust_prune.modules import (
    checked,
    evaluating,
    make_contiguous_,
    network_of,
    own_,
    sharing,
)
from robust_prune.types import ChannelGroup, Cost, PruningPlan, Unprunable

logger = logging.getLogger(__name__)


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
        only: Sequence[str] = (),
        min_width: int = MIN_WIDTH,
        probe: bool = True,
        ties: Sequence[tuple[str, str]] = (),
        whole_heads: bool = False,
    ) -> None:
        """Trace the model, and try on a copy that pruning its groups does what masking them does.

        Args:
            model: any module on images; left as it was, in mode and requires_grad.
            input_size: (channels, height, width) that costs are counted at.
            protect: dotted layer names or patterns such as `layer1.*` that must stay whole.
            only: the same of those that alone may lose channels; none means all.
            min_width: channels that every group keeps at least (fewer if it has fewer).
            probe: False trusts that every group can be pruned, which costs half the time.
            ties: what an earlier probe found out, from a plan.
            whole_heads: attentions lose whole heads, which hardware likes; otherwise the same dims
                of every head.

        Raises:
            ModelError: the model does not take such images, or computes its weights.
            UsageError: a name in `protect` or `only` matches no layer.
        """
        self.model = model
        self.input_size = input_size
        net = network_of(model)
        layers = [n for n, m in net.named_modules() if isinstance(m, (_ConvNd, nn.Linear))]
        for layer in layers:
            weight_of(net.get_submodule(layer))  # refuses weights that are computed from others
        protected = staying(net, protect, only)
        self.whole_heads = whole_heads
        example = Example(example_image(net, input_size))
        with checked(input_size), evaluating(net):
            wiring, self.ties = wired(
                net,
                example,
                protected=protected,
                min_width=min_width,
                ties=ties,
                whole_heads=whole_heads,
                probe=probe,
            )
        self._wiring = wiring
        self.groups: tuple[ChannelGroup, ...] = wiring.groups
        self.unprunable: tuple[Unprunable, ...] = left_whole(net, wiring, example)
        self._by_name = {group.name: group for group in self.groups}
        self._costs = work_cost(net, wiring)
        self._protected = frozenset(protected)

    def ratios_by_group(self, ratios: Mapping[str, float]) -> dict[str, float]:
        """Return by group the share of its channels that patterns of layers ask for."""
        names = [name for name, _ in network_of(self.model).named_modules() if name]
        return ratios_by_group(ratios, names, self.groups, self.unprunable)

    def slots(self, group: str) -> tuple[Slot, ...]:
        """Return where the group's channels are stored."""
        return self._wiring.slots[group]

    def gates(self, group: str) -> tuple[Slot, ...]:
        """Return the rows of queries, whose channels nothing but a product reads."""
        return self._wiring.gates[group]

    def readers(self, group: str) -> tuple[Slot, ...]:
        """Return the columns that read a group, and the rows that only a product does."""
        return *(s for s in self.slots(group) if s.role == "in"), *self.gates(group)

    @functools.cached_property
    def dependency(self) -> DependencyGraph:
        """The same groups in torch-pruning's terms; what is cut here is cut there."""
        return DependencyGraph(whole_heads=self.whole_heads).adopt(
            network_of(self.model), self._wiring, self.unprunable
        )

    def group_of(self, name: str) -> Group:
        """Return a whole group in torch-pruning's terms, as its importances take it."""
        return self.dependency.group_of(name)

    def cost(self, widths: Mapping[str, int] | None = None) -> Cost:
        """Return the exact cost when groups have these widths; missing ones stay whole."""
        widths = widths or {}
        macs, params = self._costs.at(self._units_gone(widths), self._costs_of_empty(widths))
        channels = sum(widths.get(group.name, group.width) for group in self.groups)
        return Cost(macs, params, channels)

    def layers(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Return how many weights each layer that groups touch has at these widths."""
        return self._costs.layers(self._units_gone(widths))

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Residual blocks that can go whole; found by running them when first asked.

        None of them has a protected layer. A plan that keeps no channel of a block's groups leaves
        the block empty.
        """
        net, run = network_of(self.model), passing(self.input_size)
        with checked(self.input_size), evaluating(net):
            found = find_blocks(net, self._wiring, self._costs, run)
        stay = self._protected
        return tuple(b for b in found if not any(n.startswith(f"{b.name}.") for n in stay))

    def empty_blocks(self, widths: Mapping[str, int]) -> tuple[Block, ...]:
        """Return the blocks whose groups keep nothing at these widths; PlanError for others."""
        none = {name for name, width in widths.items() if not width}
        if not none:
            return ()
        found = tuple(block for block in self.blocks if none.issuperset(block.groups))
        if left := none.difference(*(block.groups for block in found)):
            raise PlanError(
                f"nothing is kept of {min(left)!r}, which is no residual block of this model "
                f"that can go whole ({len(self.blocks)} can): keep at least one channel of it"
            )
        return found

    def _costs_of_empty(self, widths: Mapping[str, int]) -> list[EmptyCost]:
        return [block.cost for block in self.empty_blocks(widths)]

    def _units_gone(self, widths: Mapping[str, int]) -> dict[str, int]:
        return {
            name: (group.width - widths[name]) // group.blocks
            for name, group in self._by_name.items()
            if name in widths
        }

    @property
    def reachable(self) -> float:
        """Share of the parameters that lie along channels which can be removed."""
        tensors = self._costs.tensors
        touched = sum(math.prod(t.shape) for t in tensors if t.shares)
        return touched / max(sum(math.prod(t.shape) for t in tensors), 1)

    @functools.cached_property
    def uncounted(self) -> tuple[str, ...]:
        """Lines about work that multiply-adds leave out; costs a forward pass when first asked."""
        return uncounted_work(self.model, self.input_size)

    def check(self, plan: PruningPlan) -> dict[str, int]:
        """Return the widths that a plan leaves; PlanError unless it was made for this model.

        Multiply-adds may be those of weights alone, as plans of earlier versions record them.
        """
        widths: dict[str, int] = {}
        for item in plan.groups:
            group = self._by_name.get(item.name)
            if group is None:
                raise PlanError(
                    f"the plan prunes {item.name!r}, which is no prunable group of this model "
                    f"({len(self.groups)} groups); was it made for another network?"
                )
            if group.width != item.width:
                raise PlanError(
                    f"the plan expects {item.width} channels in {item.name!r}, this model has "
                    f"{group.width}; was it already pruned?"
                )
            units = {group.unit(i) for i in item.keep}
            widths[item.name] = item.keep_width
            if len(units) * group.blocks != len(item.keep):
                raise PlanError(
                    f"the plan keeps channels of {item.name!r} that {group.blocks} blocks (of a "
                    "grouped convolution) or heads (of an attention) can't keep apart"
                )
        if {block.name for block in self.empty_blocks(widths)} != set(plan.blocks):
            raise PlanError(f"the plan leaves other blocks empty than it says: {plan.blocks}")
        counted = self.cost(), self.cost(widths)
        by_weights = [
            self._costs.of_weights(self._units_gone(w), self._costs_of_empty(w))
            for w in ({}, widths)
        ]
        check_counts(plan, counted, by_weights)
        return widths

    def recounted(self, plan: PruningPlan) -> PruningPlan:
        """Return the plan with its multiply-adds as they are counted now.

        Plans of earlier versions leave out products between activations, as those inside an
        attention. Such a plan keeps the same channels and says in a note what it was recorded with.

        Raises:
            PlanError: the plan was made for another network.
        """
        counted = replace(plan, dense=self.cost(), pruned=self.cost(self.check(plan)))
        if (counted.dense.macs, counted.pruned.macs) == (plan.dense.macs, plan.pruned.macs):
            return plan  # its channels may be fewer: the trial that it was made with left some out
        line = (
            f"recorded with {plan.dense.macs:,} and {plan.pruned.macs:,} multiply-adds, counted "
            "without products between activations"
        )
        return replace(counted, notes=(*plan.notes, line))

    def dropped(self, plan: PruningPlan) -> dict[str, Tensor]:
        """Return by group True [units] for the units that a plan drops."""
        found = {}
        for item in plan.groups:
            group = self._by_name[item.name]
            gone = torch.ones(group.units, dtype=torch.bool)
            gone[[group.unit(i) for i in item.keep]] = False
            if bool(gone.any()):
                found[item.name] = gone
        return found

    def _narrowed(self, plan: PruningPlan) -> dict[str, Tensor]:
        """Return the same but groups of blocks that go whole."""
        return {g: gone for g, gone in self.dropped(plan).items() if not bool(gone.all())}

    def scaled_rows(self, plan: PruningPlan) -> dict[str, list[tuple[Tensor, float]]]:
        """Return by tensor the rows (dense indices) that pruning multiplies, and by what."""
        dropped = self._narrowed(plan)
        stays = {name: int((~gone).sum()) / len(gone) for name, gone in dropped.items()}
        return self._wiring.scaled_rows(stays)

    def apply_(self, plan: PruningPlan) -> None:
        """Remove the channels that `plan` drops, in place. The graph is spent afterwards.

        Raises:
            PlanError: the plan does not fit; the model is untouched.
        """
        self._cut_(self.model, self.dependency.remaining, plan)

    def pruned(self, plan: PruningPlan) -> nn.Module:
        """Return a copy of the model, pruned by `plan`; model and graph stay as they are."""
        smaller = sharing(self.model)
        self._cut_(smaller, Remaining(self._wiring, network_of(smaller)), plan)
        own_(smaller, self.model)
        return smaller

    def _cut_(self, model: nn.Module, whole: Remaining, plan: PruningPlan) -> None:
        recorded, plan = plan, self.recounted(plan)
        if plan is not recorded:
            logger.warning("plan %s: %s", plan.digest, plan.notes[-1])
        net = network_of(model)
        whole.remove_(self._narrowed(plan))
        if empty := self.empty_blocks(plan.widths):
            slots = {g: [whole.slot(g, s) for s in self.slots(g)] for b in empty for g in b.groups}
            empty_blocks_(net, empty, slots, passing(plan.input_size))
        for parameter in net.parameters():
            parameter.grad = None
        make_contiguous_(net)
        counted = count_cost(model, plan.input_size)
        if (counted.macs, counted.params) != (plan.pruned.macs, plan.pruned.params):
            raise PlanError(
                f"the pruned model has {counted.macs:,} multiply-adds and {counted.params:,} "
                f"parameters, the plan promised {plan.pruned.macs:,} and {plan.pruned.params:,}"
            )

    def names_after(self, plan: PruningPlan) -> dict[str, str]:
        """Return, by the name that each group has once the plan is applied, its name here."""
        names = self._wiring.names_after(self._narrowed(plan))
        return {now: name for now, name in names.items() if plan.widths.get(name, 1)}

    def mask_(self, plan: PruningPlan) -> None:
        """Silence the channels that `plan` drops, in place."""
        self.check(plan)
        silence_(network_of(self.model), self._wiring, self.dropped(plan))
