"""torch-pruning's dependency graph, filled by the tracer: true for every architecture."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.dependency import Node

from robust_prune.errors import UsageError
from robust_prune.graph.assembly import Assembly
from robust_prune.graph.costs import weight_of
from robust_prune.graph.cutting import Axis, Remaining
from robust_prune.graph.example import Example
from robust_prune.graph.items import Group
from robust_prune.graph.left_whole import left_whole
from robust_prune.graph.masking import silence_
from robust_prune.graph.probing import wired
from robust_prune.graph.roots import (
    LAYERS,
    LayerPruner,
    Units,
    UnitsPruner,
    handler_of,
    is_mixing,
    kind_of,
    roots_of,
)
from robust_prune.graph.tracing import Slot
from robust_prune.graph.wiring import Wiring
from robust_prune.modules import network_of
from robust_prune.types import ChannelGroup, Unprunable

Importance = tp.importance.Importance  # what a pruner calls with a group
PARAMETER = tp.pruner.function.PrunerBox[ops.OPTYPE.PARAMETER]
ROOT_TYPES = (ops.TORCH_CONV, ops.TORCH_LINEAR)


class DependencyGraph(tp.DependencyGraph):  # type: ignore[misc]
    """Which channels go together, in torch-pruning's terms, for its importances and pruners.

    A subclass of torch-pruning's graph with its signatures. The groups come from one traced
    forward pass, are tried on a copy, and are cut as a whole: biases, buffers, numbers in modules
    such as an attention's `head_dim`, its scale. `unprunable` says what is not offered, and why.

        graph = robust_prune.DependencyGraph().build_dependency(model, images)
        for group in graph.get_all_groups(ignored_layers=[model.fc]):
            group.prune(importance(group).argsort()[:8].tolist())
    """

    def __init__(
        self, *, whole_heads: bool = False, prune_outputs: bool = False, probe: bool = True
    ) -> None:
        """Choose what the graph may offer.

        Args:
            whole_heads: attentions lose whole heads, instead of the same dims of every head.
            prune_outputs: offer the channels that the network returns (its classes), as
                torch-pruning does unless their layer is ignored. They are not tried on a copy.
            probe: False trusts that every group can be pruned, which costs half the time.
        """
        super().__init__()
        self.whole_heads, self.prune_outputs, self.probe = whole_heads, prune_outputs, probe
        self.unprunable: tuple[Unprunable, ...] = ()
        self._units_pruner = UnitsPruner()
        self._out_channel_pruning_fn.add(self._units_pruner.prune_out_channels)

    def build_dependency(
        self,
        model: nn.Module,
        example_inputs: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        output_transform: Callable[[Any], Any] | None = None,
        unwrapped_parameters: Any = None,
        customized_pruners: Mapping[Any, Any] | None = None,
        ignored_layers: Sequence[nn.Module] | None = None,
        ignored_params: Sequence[nn.Parameter] | None = None,
        verbose: bool = True,
    ) -> DependencyGraph:
        """Trace the model, and try on a copy that pruning its groups does what masking them does.

        The model is left as it was, in eval or train mode.

        Args:
            model: any module.
            example_inputs: a tensor, a list or tuple of arguments, or a mapping of keywords. Of
                a batch of images [N, C, H, W] the first is enough.
            forward_fn: (model, example_inputs) -> outputs, where a plain call does not do.
            output_transform: has nothing to say here: outputs are found wherever they are.
            unwrapped_parameters: the same: the tracer finds bare parameters and their dimension.
            customized_pruners: not called: the graph cuts such modules itself, and warns of it.
            ignored_layers: their groups are not offered.
            ignored_params: the same for parameters.
            verbose: warn of what is not used.

        Raises:
            ModelError: a weight is computed from others.
        """
        self.verbose, self.model = verbose, model
        for kind, pruner in (customized_pruners or {}).items():
            self.register_customized_layer(kind, pruner)
        if self.CUSTOMIZED_PRUNERS and verbose:
            names = ", ".join(getattr(k, "__name__", str(k)) for k in self.CUSTOMIZED_PRUNERS)
            line = f"the pruners of {names} are not called: this graph cuts such modules itself"
            warnings.warn(line, stacklevel=2)
        net = network_of(model)
        if isinstance(example_inputs, Tensor) and forward_fn is None and example_inputs.ndim == 4:
            example_inputs = example_inputs[:1]
        for layer in net.modules():
            if isinstance(layer, ROOT_TYPES):
                weight_of(layer)  # refuses weights that are computed from others
        example = Example(example_inputs, forward_fn)
        wiring, self.ties = wired(
            net,
            example,
            whole_heads=self.whole_heads,
            outputs_stay=not self.prune_outputs,
            probe=self.probe,
        )
        self.IGNORED_LAYERS_IN_TRACING.extend(ignored_layers or ())
        self.ignored_params = list(ignored_params or ())
        return self.adopt(net, wiring, left_whole(net, wiring, example))

    def adopt(
        self, net: nn.Module, wiring: Wiring, unprunable: tuple[Unprunable, ...]
    ) -> DependencyGraph:
        """Take the groups of a network that has been traced already, and what is in none."""
        self.model = getattr(self, "model", net)
        self.wiring, self.unprunable = wiring, unprunable
        self.remaining = Remaining(wiring, net)
        self._modules = dict(net.named_modules())
        self._roots, folds = roots_of(wiring, self._modules)
        self._pruners = {
            module: LayerPruner(self.REGISTERED_PRUNERS[kind_of(module)], folds.get(name, {}))
            for name, module in self._modules.items()
        }
        self._units = {g: Units(g, wiring.units(g)) for g, r in self._roots.items() if not r.slot}
        self._module2name = {module: name for name, module in self.model.named_modules()}
        self._module2name |= {units: f"units of {g}" for g, units in self._units.items()}
        self.module2node = {m: Node(m, None, name) for m, name in self._module2name.items()}
        self._parameters = self._nodes_of_parameters()
        self._assembly = Assembly(
            wiring, self.remaining, self._modules, self.module2node, self._parameters
        )
        return self

    def _nodes_of_parameters(self) -> dict[Axis, Node]:
        """Give each parameter that is no layer's of torch-pruning a node of its own."""
        nodes: dict[Axis, Node] = {}
        self._param_to_name: dict[nn.Parameter, str] = {}
        for slot in (s for group in self.wiring.groups for s in self.wiring.slots[group.name]):
            tensor, layer = self._tensor(slot.tensor), self._modules[slot.layer]
            bias = slot.tensor.endswith(".bias") and kind_of(layer) in LAYERS
            known = bias or handler_of(layer, slot) is not None
            if isinstance(tensor, nn.Parameter) and not known:
                node = nodes[slot.tensor, slot.dim] = Node(tensor, None, slot.tensor)
                node.pruning_dim = slot.dim
                self.module2node.setdefault(tensor, node)
                self._param_to_name[tensor] = self._module2name[tensor] = slot.tensor
        return nodes

    def _tensor(self, name: str) -> Tensor:
        layer, _, leaf = name.rpartition(".")
        found: Tensor = getattr(self._modules[layer], leaf)
        return found

    # what torch-pruning's pruners ask

    def get_pruner_of_module(self, module: Any) -> Any:
        """Return torch-pruning's own pruner of a module, which says how many channels it has."""
        if isinstance(module, Units):
            return self._units_pruner
        if isinstance(module, nn.Parameter):
            return PARAMETER
        found = getattr(self, "_pruners", {}).get(module)
        return super().get_pruner_of_module(module) if found is None else found

    def get_out_channels(self, module_or_node: Any) -> int | None:
        """Return how many output channels a module, or its node, has now; None if it has none."""
        return self._channels(module_or_node, "get_out_channels")

    def get_in_channels(self, module_or_node: Any) -> int | None:
        """Return how many input channels a module, or its node, has now; None if it has none."""
        return self._channels(module_or_node, "get_in_channels")

    def _channels(self, module_or_node: Any, question: str) -> int | None:
        node = module_or_node if isinstance(module_or_node, Node) else None
        node = node or self.module2node[module_or_node]
        if isinstance(node.module, nn.Parameter):
            return int(node.module.shape[node.pruning_dim])
        found: int | None = getattr(self.get_pruner_of_module(node.module), question)(node.module)
        return found

    def get_all_groups(
        self,
        ignored_layers: Sequence[Any] = (),
        root_module_types: Sequence[type] = ROOT_TYPES,
    ) -> Iterator[Group]:
        """Yield every group with all of its channels.

        Args:
            ignored_layers: modules whose outputs must stay.
            root_module_types: a layer of one of these types must make the group's channels.
        """
        ignored = {id(m) for m in (*ignored_layers, *self.IGNORED_LAYERS_IN_TRACING)}
        ignored |= {id(p) for p in self.ignored_params}
        for group in self.wiring.groups:
            slots = self.wiring.slots[group.name]
            held = {id(self._modules[s.layer]) for s in slots if s.role != "in"}
            held |= {id(self._tensor(s.tensor)) for s in slots}
            makers = [self._modules[s.layer] for s in slots if s.role == "out"]
            typed = any(isinstance(m, tuple(root_module_types)) or not is_mixing(m) for m in makers)
            if typed and not held & ignored:
                yield self.group_of(group.name)

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """The groups that can be pruned, as wide as they are now."""
        return tuple(self._now(group) for group in self.wiring.groups)

    def _now(self, group: ChannelGroup) -> ChannelGroup:
        units = self.remaining.units(group.name)
        new = {int(unit): i for i, unit in enumerate(units)}
        order = tuple(new[unit] for unit in group.units_of if unit in new)
        width = len(units) * group.blocks
        return replace(group, width=width, min_width=min(width, group.min_width), units_of=order)

    def slots(self, group: str) -> tuple[Slot, ...]:
        """Return where the group's channels are stored now."""
        return tuple(self.remaining.slot(group, slot) for slot in self.wiring.slots[group])

    def gates(self, group: str) -> tuple[Slot, ...]:
        """Return the rows of queries, whose channels nothing but a product reads."""
        return tuple(self.remaining.slot(group, slot) for slot in self.wiring.gates[group])

    def group_of(self, name: str) -> Group:
        """Return the whole group of a name, that is of the layer that first makes its channels."""
        slot, units = self._roots[name].slot, {name: self.remaining.units(name)}
        if slot is None:
            return self._group(self._units[name], self._units_pruner.prune_out_channels, units)
        module = self._modules[slot.layer]
        return self._group(module, handler_of(module, slot), units)

    def _group(self, module: Any, pruning_fn: Any, units: Mapping[str, Tensor]) -> Group:
        return self._assembly.fill(Group(self, units), module, pruning_fn, self._side(pruning_fn))

    def _side(self, pruning_fn: Callable[..., Any]) -> str:
        return "out" if self.is_out_channel_pruning_fn(pruning_fn) else "in"

    def get_pruning_group(self, module: Any, pruning_fn: Callable[..., Any], idxs: Any) -> Group:
        """Return what has to go with some channels of a layer.

        Args:
            module: a layer of the model, a bare parameter, or the root of a group.
            pruning_fn: torch-pruning's function for its outputs or its inputs.
            idxs: channel numbers, as the layer has them now.

        Raises:
            ValueError: the module is not in the graph.
            UsageError: the channels have to stay.
        """
        if module not in self.module2node:
            raise ValueError(f"Module {module} is not in the dependency graph.")
        wanted = sorted({int(i) for i in ([idxs] if isinstance(idxs, int) else idxs)})
        if isinstance(module, Units):
            units = {module.group: self.remaining.units(module.group)[wanted]}
        else:
            units = self._assembly.units_of(module, self._side(pruning_fn), wanted)
        return self._group(module, pruning_fn, units)

    def check_pruning_group(self, group: Group) -> bool:
        """Return whether something is left of every group that these channels belong to."""
        return all(
            len(units) < len(self.remaining.units(name)) for name, units in group.units.items()
        )

    # cutting

    def line_of(self, group: Group) -> list[Any]:
        """Return a group as the pruning history has it, by a layer that a replay can find."""
        target, fn = group[0].dep.target.module, group[0].dep.handler
        idxs = list(group[0].idxs)
        if isinstance(target, (Units, nn.Parameter)):
            name, slot = next((n, s) for n in group.units for s in self._assembly.layers(n))
            target = self._modules[slot.layer]
            fn, idxs = handler_of(target, slot), self._assembly.channels(name, slot, group.units)
        return [self._module2name[target], self._side(fn) == "out", idxs]

    def cut_(self, units: Mapping[str, Tensor]) -> None:
        """Remove units of groups, by the numbers they were traced with, from the network.

        Raises:
            UsageError: nothing would be left of a group; the network is untouched.
        """
        dropped = {}
        for name, numbers in units.items():
            if not bool((~torch.isin(self.remaining.units(name), numbers)).any()):
                raise UsageError(
                    f"these channels take all others of {name} with them, so that nothing would "
                    "be left; of an attention the same dims of every head go together, and heads "
                    "go whole with whole_heads=True"
                )
            dropped[name] = torch.zeros(self.wiring.units(name), dtype=torch.bool)
            dropped[name][numbers] = True
        self.remaining.remove_(dropped)
        for name in units:
            if name in self._units:
                self._units[name].count = len(self.remaining.units(name))
        for (tensor, _), node in self._parameters.items():
            here: Any = self._tensor(tensor)
            if here is not node.module:
                for known in (self.module2node, self._module2name, self._param_to_name):
                    if node.module in known:
                        known[here] = known.pop(node.module)
                node.module = here

    def mask_(self, dense: nn.Module) -> nn.Module:
        """Silence, in a copy of the network as it was traced, what has been removed since.

        Its outputs are what those of the pruned network must be.
        """
        silence_(network_of(dense), self.wiring, self.remaining.gone)
        return dense
