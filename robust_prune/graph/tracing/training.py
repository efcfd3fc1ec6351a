"""The pass in train mode: modules that it alone runs read channels, too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from robust_prune.errors import ModelError
from robust_prune.graph.tracing.adapters import adapted
from robust_prune.graph.tracing.tracer import Call, Tracer, call_of, following
from robust_prune.modules import copied, seeded, tensors_in

RUN_ERRORS = ModelError, RuntimeError, ValueError, AssertionError, TypeError, IndexError
# what torch takes its time over on the meta device, in Python, to find the shape of its input
SAME_SHAPE = {"batch_norm", "layer_norm"}
REASON = "only a pass in train mode uses it"


@contextlib.contextmanager
def train_mode(net: nn.Module) -> Iterator[None]:
    """Let modules take their branches of train mode, without its noise or statistics.

    Norms, and what has neither parameters nor parts (dropout), stay in eval mode: they do the same
    to channels in both. Modes, buffers and the random state are put back.
    """
    modes = [(module, module.training) for module in net.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    for module, _ in modes:
        holds = any(True for _ in module.children()) or any(True for _ in module.parameters())
        module.training = holds and not isinstance(module, _NormBase)
    try:
        with seeded(0):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, before in buffers:
            buffer.copy_(before)


class _Calls(TorchFunctionMode):
    """Records which module calls which function with which parameters.

    Args:
        parameters: ids to record parameters by, by their ids in the network that runs.
    """

    def __init__(self, parameters: Mapping[int, int]) -> None:
        super().__init__()
        self.parameters = parameters
        self.stack: list[str] = []
        self.found: set[Call] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        running = self.stack[-1] if self.stack else ""
        owner, name, given = call_of(running, func, args, kwargs or {}, self.parameters)
        self.found.add((owner, name, tuple(self.parameters[key] for key in given)))
        if name in SAME_SHAPE and args and _only_shaped(args[0]):
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def trace_training(
    net: nn.Module,
    run: Callable[[nn.Module], Any],
    run_shapes: Callable[[nn.Module], Any],
    tracer: Tracer,
    outputs_stay: bool = True,
) -> bool:
    """Follow a pass in train mode as well, if it calls anything that the pass before did not.

    What it alone makes stays whole: nothing measured in eval mode says what such channels are
    worth. It runs on copies that share parameters and buffers, or have their shapes alone, so that
    what modules count or keep stays as it was.

    Args:
        net: left as it was.
        run: runs it, on two images: some functions take no batch of one in train mode.
        run_shapes: the same on the meta device, where shapes are computed and nothing else.
        tracer: has followed a pass in eval mode.
        outputs_stay: the channels of what it returns can't be removed.

    Returns:
        Whether there was more to follow. A network that does not run in train mode has no more.
    """
    tensors = [*net.parameters(), *net.buffers()]
    by_shape = _calls(net, run_shapes, {id(t): _without_values(t) for t in tensors})
    if by_shape is not None and by_shape <= tracer.calls:
        return False
    shared = {id(tensor): tensor for tensor in tensors}
    calls = _calls(net, run, shared)
    if calls is None or calls <= tracer.calls:
        return False
    labels = tracer.labels
    made = set(labels.out_dims)
    uses = {key: list(times) for key, times in labels.uses.items()}
    gates, scaled = list(labels.gates), list(labels.scaled)
    twin = copied(net, dict(shared))
    tracer.follow(twin)
    with torch.no_grad(), train_mode(twin), adapted(twin), following(twin, tracer), tracer:
        out = run(twin)
    for tensor in tensors_in((out,)) if outputs_stay else ():
        labels.fix(tracer.returned(tensor), "its channels are the model's outputs")
    for key, dim in labels.out_dims.items():
        if key not in uses and key not in made:
            labels.fix(labels.axes[key, dim], REASON)
    labels.uses, labels.gates, labels.scaled = uses, gates, scaled
    return True


def _calls(
    net: nn.Module, run: Callable[[nn.Module], Any], stands_for: Mapping[int, Tensor]
) -> set[Call] | None:
    """Return what a copy calls in train mode, by the network's own parameters; None if it fails.

    Args:
        net: left as it was.
        run: runs the copy.
        stands_for: what the copy has for a parameter or buffer of the network, by its id.
    """
    calls = _Calls({id(stands_for[id(p)]): id(p) for p in net.parameters()})
    try:
        twin = copied(net, dict(stands_for))
        with torch.no_grad(), train_mode(twin), adapted(twin), following(twin, calls), calls:
            run(twin)
    except RUN_ERRORS:
        return None
    return calls.found


def _only_shaped(tensor: Any) -> bool:
    """Return whether a tensor has no values, and enough of them for a batch norm to take."""
    if not isinstance(tensor, Tensor) or not tensor.is_meta or tensor.ndim < 2:
        return False
    return tensor.numel() > 2 * tensor.shape[1]


def _without_values(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty
