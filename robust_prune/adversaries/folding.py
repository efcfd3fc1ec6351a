"""Batch norms folded into the convolutions before them, for attacks in eval mode."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robust_prune.modules import copied, device_of, plain_layout, seeded

PROBES = 8
TOLERANCE = 1e-9
# subclasses may compute something else from the same weights, so only these very classes are folded
_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_OWN = frozenset(vars(nn.Module()))
Pairs = tuple[tuple[str, str], ...]
logger = logging.getLogger(__name__)


class Folded:
    """A copy of a model in eval mode, with batch norms folded into the layers before them.

    An attack of K steps asks for K gradients of images at the same weights, and batch norms cost
    more there than their arithmetic: each writes and reads maps that the convolution could have
    written right away. Folding is linear algebra, so logits are equal up to rounding.

    Everything that is not folded is the model's own: parameters, buffers, and plain values that
    its modules hold (numbers, strings, tensors, lists of them). Limits: the copy's structure is
    that of the moment it was made, so a module replaced later ends it (see `stands_for`); a dict
    or an object of the user's that a module holds is copied once and not followed.
    """

    def __init__(self, model: nn.Module, pairs: Pairs) -> None:
        """Fold (layer, batch norm) pairs, by name, without proof; `Folded.of` is for use."""
        own: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
        self._model, self._names = model, pairs
        self._copy = copied(model, own)
        live, copies = dict(model.named_modules()), dict(self._copy.named_modules())
        self._modules = [(module, copies[name]) for name, module in live.items()]
        self._pairs = [(live[layer], live[norm], copies[layer]) for layer, norm in pairs]
        for _, norm in pairs:
            # in the module itself, so that whoever else refers to it calls the same
            copies[norm].__dict__["forward"] = functools.partial(_rest, copies[norm])

    @classmethod
    def of(cls, model: nn.Module, images: Tensor) -> Folded | None:
        """Return the folded copy, or None where nothing can be folded or nothing proven.

        A batch norm is folded if a run shows that it alone reads the output of a convolution or
        linear layer, each of them called once. The proof: in float64, with stirred statistics,
        copy and model give the same logits; pairs that do not are left as they are.

        Args:
            model: gives logits [N, K]; left as it is.
            images: [N, C, H, W] in [0, 1], of which a few are used.
        """
        probes = plain_layout(images[:PROBES].detach().to(device_of(model))).double()
        try:
            with seeded(0), torch.no_grad():
                pairs = _proven(model, probes)
            return cls(model, pairs) if pairs else None
        except Exception as error:  # noqa: BLE001 - a user's module may raise anything
            logger.info("batch norms stay as they are in attacks: %s", error)
            return None

    @property
    def pairs(self) -> Pairs:
        """Names of the folded layers, each with its batch norm's."""
        return self._names

    def stands_for(self, model: nn.Module) -> bool:
        """Return whether this is a copy of that very model, whose modules are still the same."""
        if model is not self._model:
            return False
        now = dict(model.named_modules()).values()
        same = all(a is b for a, (b, _) in zip(now, self._modules, strict=False))
        foldable = all(_is_layer(layer) and _is_norm(norm) for layer, norm, _ in self._pairs)
        return same and len(now) == len(self._modules) and foldable

    @torch.no_grad()
    def refreshed(self) -> nn.Module:
        """Return the copy, in eval mode, with the weights and statistics the model has now.

        Its parameters are detached, so no gradient reaches the model's; recurrent layers hold
        theirs in a list, too, and are the exception. The next call changes the module that this
        one returned.
        """
        self._copy.train()  # some modules drop what they computed from older weights only here
        self._copy.eval()
        for module, twin in self._modules:
            twin.__dict__["_parameters"] = {
                name: None if parameter is None else parameter.detach()
                for name, parameter in module._parameters.items()
            }
            twin.__dict__["_buffers"] = dict(module._buffers)
            for name, value in vars(module).items():
                if name not in _OWN and _is_value(value):
                    twin.__dict__[name] = value
        for layer, norm, twin in self._pairs:
            twin._parameters.update(_folded(layer, norm))
        return self._copy


def _folded(layer: Any, norm: Any) -> dict[str, Tensor]:
    """Return weight and bias of one layer that does what layer and norm do in eval mode."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
    bias = shift * scale if norm.bias is None else torch.addcmul(norm.bias, shift, scale)
    weight = layer.weight * scale.view(-1, *[1] * (layer.weight.ndim - 1))
    return {"weight": plain_layout(weight), "bias": bias}


def _rest(norm: Any, features: Tensor) -> Tensor:
    """Do what a batch norm does beside normalising: nothing, or timm's dropout and activation."""
    if type(norm) in _NORMS:
        return features
    result: Tensor = norm.act(norm.drop(features))
    return result


def _is_value(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_value(item) for item in value)
    return value is None or isinstance(value, (int, float, str, Tensor))


def _is_layer(module: nn.Module) -> bool:
    """Whether a layer computes with its own parameters and nothing else."""
    weight = module._parameters.get("weight")
    return type(module) in _LINEAR and weight is not None and _is_untouched(module)


def _is_norm(module: nn.Module) -> bool:
    """Whether a batch norm in eval mode uses running statistics, and what follows it is known."""
    if not isinstance(module, _BatchNorm) or not _is_untouched(module):
        return False
    if module.running_mean is None or module.running_var is None:
        return False
    children = {name for name, _ in module.named_children()}
    with_activation = type(module).__module__.startswith("timm.") and children == {"drop", "act"}
    return type(module) in _NORMS or with_activation


def _is_untouched(module: nn.Module) -> bool:
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return not any(hooks) and "forward" not in vars(module)


def _proven(model: nn.Module, images: Tensor) -> Pairs:
    """Return the pairs that can be folded together without changing logits."""
    stirred = copied(model).double().eval()
    _stir_(stirred, images)
    expected = stirred(images)
    if not bool(expected.isfinite().all()):
        return ()

    def agrees(pairs: Pairs) -> bool:
        try:
            logits = Folded(stirred, pairs).refreshed()(images)
        except Exception as error:  # noqa: BLE001 - as above; such a pair is not folded
            logger.debug("%s can't be folded: %s", pairs, error)
            return False
        limit = TOLERANCE * float(expected.abs().max())
        return logits.shape == expected.shape and float((logits - expected).abs().max()) <= limit

    pairs = _followers(stirred, images)
    if not agrees(pairs):
        pairs = tuple(pair for pair in pairs if agrees((pair,)))
    return pairs if agrees(pairs) else ()


def _stir_(model: nn.Module, images: Tensor) -> None:
    """Give batch norms statistics, scales and shifts of their own, and zeros other values.

    A norm that does nothing yet, or a branch that starts at zero, would hide a wrong fold. The
    statistics are those of the images, disturbed, so that signals neither vanish nor explode.
    """
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        # a synchronised norm would wait for other processes
        norm.training = len(images) > 1 and not isinstance(norm, nn.SyncBatchNorm)
    model(images)
    for norm in norms:
        norm.training, mean, variance = False, norm.running_mean, norm.running_var
        if mean is not None and variance is not None:
            mean.add_(0.5 * variance.sqrt() * torch.randn_like(mean))
            variance.mul_(0.5 + torch.rand_like(variance)).add_(0.01)
        if norm.affine:
            norm.weight.add_(0.2 + 0.2 * torch.rand_like(norm.weight))
            norm.bias.add_(0.2 * torch.randn_like(norm.bias))


def _followers(model: nn.Module, images: Tensor) -> Pairs:
    """Return (layer, batch norm) names where the norm alone reads the layer's output."""
    names = {module: name for name, module in model.named_modules()}
    reads = _Reads()
    handles = []
    for module in model.modules():
        if _is_layer(module):
            handles.append(module.register_forward_hook(reads.after_layer))
        elif _is_norm(module):
            handles.append(module.register_forward_pre_hook(reads.before_norm))
            handles.append(module.register_forward_hook(reads.after_norm))
    try:
        with reads:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    readers = Counter(reads.source.values())
    return tuple(
        (names[layer], names[norm])
        for norm, layer in reads.source.items()
        if reads.calls[layer] == reads.calls[norm] == readers[layer] == 1
        and layer not in reads.used_elsewhere
    )


class _Reads(TorchDispatchMode):
    """Follows outputs of layers to the batch norms, and notes every other operation on them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[nn.Module] = Counter()
        self.source: dict[nn.Module, nn.Module] = {}
        self.used_elsewhere: set[nn.Module] = set()
        self._outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # tensors kept, so ids stay theirs
        self._reader: nn.Module | None = None

    def after_layer(self, layer: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
        self.calls[layer] += 1
        if not isinstance(layer, nn.Linear) or output.ndim == 2:  # else channels are not dim 1
            self._outputs[id(output)] = layer, output

    def before_norm(self, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.calls[norm] += 1
        if inputs and id(inputs[0]) in self._outputs:
            self.source[norm] = self._outputs[id(inputs[0])][0]
            self._reader = self.source[norm]

    def after_norm(self, *_: object) -> None:
        self._reader = None

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            layer = self._outputs.get(id(value), (None,))[0]
            if layer is not None and layer is not self._reader:
                self.used_elsewhere.add(layer)
        return func(*args, **(kwargs or {}))
