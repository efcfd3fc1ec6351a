"""Whole modules out of a pickle that the user trusts: which one is meant, and what it is."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.loss import _Loss

from robust_prune.errors import ModelError
from robust_prune.models.architecture import infer_kwargs
from robust_prune.models.builders import (
    build_model,
    default_input_size,
    is_name,
    per_channel,
    resolve_spec,
    state_shapes,
)
from robust_prune.models.content import Content
from robust_prune.models.matching import is_average
from robust_prune.modules import ImageModel, device_of, evaluating

WRAPPING = ("module", "_orig_mod", "_fsdp_wrapped_module")  # how wrappers call what they wrap


def find_module(content: Content) -> tuple[nn.Module | None, tuple[str, ...]]:
    """Return the network among a pickle's modules, out of its wrappers, and what is to be said.

    A running average goes before all others, then what has more parameters; losses and modules
    without parameters are no networks.
    """
    networks = {
        name: unwrapped(module)
        for name, module in content.modules.items()
        if not isinstance(module, _Loss) and any(True for _ in module.parameters())
    }
    if not networks:
        return None, ()
    order = list(networks)
    taken = min(order, key=lambda n: (not is_average(n), -_size(networks[n]), order.index(n)))
    others = [name for name in order if networks[name] is not networks[taken]]
    if not others:
        return networks[taken], ()
    why = "the moving average" if is_average(taken) else "the one with the most parameters,"
    listed = " and ".join(repr(name) for name in others[:4])
    verb = "is" if len(others) == 1 else "are"
    note = f"the file holds {len(order)} modules; {why} {taken!r} is taken, and {listed} {verb} not"
    return networks[taken], (note,)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the network inside of wrappers that pass images on: parallel, compiled, averaged."""
    while True:
        names = [name for name, _ in module.named_children()]
        wraps = len(names) == 1 and names[0] in WRAPPING and not list(_own_parameters(module))
        library = type(module).__module__.partition(".")[0] in ("torch", "timm", "accelerate")
        if not wraps or not library:
            return module
        module = getattr(module, names[0])


def in_float32(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return an unpickled module with weights as images have them, and what is to be said of it."""
    kinds = {p.dtype for p in module.parameters() if p.is_floating_point()} - {torch.float32}
    if not kinds:
        return module, ()
    said = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
    return module.float(), (f"its weights are of {said}, and are used as float32",)


def _own_parameters(module: nn.Module) -> Sequence[Any]:
    return list(module.parameters(recurse=False))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def pickle_note(loaded: nn.Module, given: bool) -> str:
    """Say what an unpickled module was taken for, and which normalisation it got."""
    if not isinstance(loaded, ImageModel):
        return (
            f"the pickled {type(loaded).__name__} is used as it is, without normalisation; give "
            "--mean and --std if it expects normalised images"
        )
    source = "as given" if given else "from its own timm configuration"
    what = f"timm {loaded.spec.arch}" if loaded.spec.source == "timm" else loaded.spec.arch
    return (
        f"the pickled module is a {what}; normalisation {source}: mean {loaded.spec.mean}, std "
        f"{loaded.spec.std}"
    )


@torch.no_grad()
def identified(
    module: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[nn.Module, Sequence[float] | None, Sequence[float] | None]:
    """Find the spec of an unpickled timm module, so that it can be stored without pickle.

    The rebuilt network must have the same weights by name and shape, and the same outputs.

    Returns:
        The network behind its normalisation, else the module itself; and the mean and std that it
        or the user says.
    """
    if isinstance(module, ImageModel):
        return module, mean, std
    config = getattr(module, "pretrained_cfg", None) or {}
    theirs: Mapping[str, Any] = config if isinstance(config, Mapping) else {}
    arch = theirs.get("architecture")
    mean, std = mean or theirs.get("mean"), std or theirs.get("std")
    state = module.state_dict()
    known = isinstance(arch, str) and is_name(arch)
    for cifar_stem in (False, True) if known else ():
        assert isinstance(arch, str)
        with contextlib.suppress(ModelError, RuntimeError):
            kwargs = infer_kwargs(arch, {}, state_shapes(arch, {}), state)
            spec = resolve_spec(arch, kwargs, cifar_stem=cifar_stem)
            channels = len(spec.mean)
            spec = replace(
                spec,
                mean=per_channel(mean or spec.mean, channels),
                std=per_channel(std or spec.std, channels),
            )
            candidate = build_model(spec)
            candidate.net.load_state_dict(state)
            images = torch.rand(2, *default_input_size(spec), device=device_of(module))
            with evaluating(module), evaluating(candidate):
                if torch.equal(candidate.net(images), module(images)):
                    return candidate, mean, std
    return module, mean, std
