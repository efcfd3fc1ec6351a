"""timm and torchvision networks, and files of them, as modules on images in [0, 1]."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_prune.errors import ModelError, UsageError
from robust_prune.files import is_there
from robust_prune.models.bounds import bounded
from robust_prune.models.builders import (
    build_model,
    check_normalisation,
    check_stored,
    default_input_size,
    is_name,
    library_versions,
    resolve_spec,
    similar,
)
from robust_prune.models.fitting import (
    check_classes,
    check_runs,
    check_stored_widths,
    refill_,
)
from robust_prune.models.hub import PREFIX, fetched
from robust_prune.models.manifest import Manifest, write
from robust_prune.models.named import Given, by_arch, from_state
from robust_prune.models.narrowing import Follow
from robust_prune.models.normalisation import BYTE_SCALE
from robust_prune.models.pickled import find_module, identified, in_float32, pickle_note
from robust_prune.models.reading import ModelFile, read
from robust_prune.models.weights import take
from robust_prune.modules import (
    ImageModel,
    empty_forms,
    fields_of,
    image_channels,
    make_contiguous_,
    network_of,
)
from robust_prune.types import ModelSpec, to_plain


def open_model(
    path_or_name: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    arch: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    cifar_stem: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: tuple[int, int, int] | None = None,
    trust_pickle: bool = False,
    device: str | torch.device = "cpu",
    follow: Follow | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Do what `robust_prune.load` says, and return the record stored with the model beside it.

    The record is empty if there is none. `follow` gives the numbers in modules that go with the
    widths of a network that was pruned elsewhere, as in `narrow_to_`.
    """
    _check_given(mean, std)
    if model is not None and not isinstance(model, nn.Module):
        raise UsageError(
            f"model={getattr(model, '__name__', model)!r} must be a module to fill, as MyNet(); a "
            "timm name goes into arch"
        )
    name = str(path_or_name)
    if name.startswith(PREFIX) and not is_there(name) and (folder := fetched(name)):
        path_or_name = name = str(folder)
    if not is_there(name) and is_name(name):
        spec = resolve_spec(name, model_kwargs, cifar_stem=cifar_stem, mean=mean, std=std)
        spec = replace(spec, input_size=input_size or default_input_size(spec))
        return build_model(spec, pretrained=True).to(device).eval(), {}
    if not is_there(name):
        raise ModelError(f"{name}: no such file or folder, nor a network of timm{similar(name)}")
    found = read(path_or_name, trust_pickle=trust_pickle)
    given = Given(arch, model_kwargs, cifar_stem, mean, std)
    loaded, record = _loaded(found, model, given, follow)
    if isinstance(loaded, ImageModel):
        loaded = _override(loaded, mean, std, input_size)
    else:
        loaded = _normalised(loaded, mean, std)
    make_contiguous_(loaded)
    return loaded.to(device).eval(), record


def _loaded(
    found: ModelFile, model: nn.Module | None, given: Given, follow: Follow | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a file and its record; what had to be decided is under `assumed`."""
    if found.manifest is not None:
        record = dict(found.manifest.record)
        if model is None and given.arch is not None and found.manifest.spec.source == "custom":
            return by_arch(found, found.manifest, given), record
        if model is None:
            _check_arch(found.path, found.manifest.spec, given.arch)
            return _from_manifest(found, found.manifest), record
        given_net, stored = network_of(model), found.manifest
        refill_(given_net, found.path, found.content.tensors, stored.fields, stored.empty)
        if found.manifest.spec.mean and not isinstance(model, ImageModel):
            model = ImageModel(model, found.manifest.spec)
        return model, record
    module, notes = find_module(found.content)
    if model is not None:
        model, notes = _into_own_class(model, found)
    elif module is not None:
        module, cast = in_float32(module)
        model, mean, std = identified(module, given.mean, given.std)
        if isinstance(model, ImageModel):
            _check_arch(found.path, model.spec, given.arch)
        if not isinstance(model, ImageModel) and mean and std:
            model = _normalised(model, mean, std)
        notes = (pickle_note(model, given.mean is not None), *cast, *notes)
    else:
        model, notes = from_state(found, given, follow)
    return model, {"assumed": list(notes)} if notes else {}


def _check_given(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Raise UsageError where a user's normalisation is half of one, or of images in 0..255."""
    if (mean is None) != (std is None):
        raise UsageError("a normalisation is a mean and a std, one value per channel; give both")
    if mean is not None and std is not None and max(map(abs, (*mean, *std))) > BYTE_SCALE:
        raise UsageError(
            f"mean {tuple(mean)} and std {tuple(std)} are of images in 0..255, and images are in "
            "[0, 1] here: divide both by 255"
        )


def _check_arch(path: Path, spec: ModelSpec, arch: str | None) -> None:
    """Raise ModelError where a file says that it holds another network than is asked for."""

    def bare(name: str) -> str:
        return name.removeprefix("torchvision/").partition(".")[0]

    if arch is not None and spec.source != "custom" and bare(arch) != bare(spec.arch):
        raise ModelError(
            f"{path}: holds a {spec.arch}, as it says itself, and no {arch}; leave out --arch"
        )


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Write the weights and everything needed to build the model again into one file, no pickle.

    A model of this package is built again by `load(path)`; of a class of your own the widths and
    weights are stored, and `load(path, model=MyNet())` puts them into a fresh instance.

    Args:
        model: the module.
        path: the `.safetensors` file to write; written whole or not at all.
        record: plan, threat model, data and results to keep with it; anything JSON can hold.
    """
    manifest = {
        **to_plain(dict(record or {})),
        "model": to_plain(spec_of(model)),
        "fields": fields_of(network_of(model)),
        **({"empty": forms} if (forms := empty_forms(network_of(model))) else {}),
        "versions": library_versions(),
    }
    return write(path, network_of(model).state_dict(), manifest)


def spec_of(model: nn.Module) -> ModelSpec:
    """Return what a file says of how to build the model: its spec, or the name of its class."""
    if isinstance(model, ImageModel):
        return model.spec
    cls = type(model)
    return ModelSpec(source="custom", arch=f"{cls.__module__}.{cls.__qualname__}")


def _from_manifest(found: ModelFile, manifest: Manifest) -> nn.Module:
    spec = manifest.spec
    check_stored(found.path, spec.arch, spec.kwargs)
    try:
        check_normalisation(spec)
    except UsageError as error:
        raise ModelError(f"{found.path}: its manifest is malformed: {error}") from None
    try:
        with bounded(found.content):
            model = build_model(spec)
        check_stored_widths(model, found.path, found.content.tensors)
        tensors = found.content.tensors
        refill_(model.net, found.path, tensors, manifest.fields, manifest.empty)
        check_classes(model)
        if manifest.fields or manifest.empty:
            check_runs(model)
    except ModelError as error:
        if str(error).startswith(str(found.path)):
            raise
        if spec.source == "custom":
            raise ModelError(f"{found.path}: {error}") from None
        raise ModelError(f"{found.path}: its manifest is malformed: {error}") from None
    return model


def _into_own_class(model: nn.Module, found: ModelFile) -> tuple[nn.Module, tuple[str, ...]]:
    """Fill an instance of the user's class, behind the normalisation that the file has."""
    net = network_of(model)
    weights = take(found.path, found.content, net.state_dict())
    refill_(net, found.path, weights.state, {}, {})
    normalisation = weights.normalisation
    if normalisation is None or isinstance(model, ImageModel):
        return model, weights.notes
    model = _normalised(model, normalisation.mean, normalisation.std)
    return model, (normalisation.note, *weights.notes)


def _override(
    model: ImageModel,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    input_size: tuple[int, int, int] | None,
) -> ImageModel:
    spec = replace(
        model.spec,
        mean=tuple(mean or model.spec.mean),
        std=tuple(std or model.spec.std),
        input_size=input_size or model.spec.input_size,
    )
    check_normalisation(spec)
    return ImageModel(model.net, spec).train(model.training)


def _normalised(
    module: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
) -> nn.Module:
    """Put a class of one's own behind the normalisation that is given, if any."""
    if mean is None or std is None:
        return module
    cls = type(module)
    spec = ModelSpec("custom", f"{cls.__module__}.{cls.__qualname__}")
    spec = replace(spec, mean=tuple(mean), std=tuple(std))
    check_normalisation(spec)
    return ImageModel(module, spec).train(module.training)


def image_size_of(model: nn.Module, given: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """Return the image size that costs are counted at: the one given, the model's, or assumed.

    Args:
        model: takes images in [0, 1].
        given: (channels, height, width) of the data, or what the user says; None for neither.
    """
    if given is not None:
        return given
    if isinstance(model, ImageModel):
        return model.spec.input_size or default_input_size(model.spec)
    return image_channels(model), 224, 224
