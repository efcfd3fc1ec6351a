"""timm and torchvision networks, and files of them, as modules on images in [0, 1]."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_prune.errors import ModelError, UsageError
from robust_prune.models.builders import (
    build_model,
    check_normalisation,
    check_stored,
    default_input_size,
    infer_kwargs,
    is_name,
    library_versions,
    per_channel,
    resolve_spec,
    similar,
)
from robust_prune.models.checkpoint import Checkpoint, read, write
from robust_prune.modules import (
    ImageModel,
    device_of,
    evaluating,
    fields_of,
    fit_,
    image_channels,
    make_contiguous_,
    network_of,
    set_fields_,
)
from robust_prune.types import ModelSpec, to_plain


def load(
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
) -> nn.Module:
    """Read a model file, or build a pretrained network by its timm name.

    Args:
        path_or_name: our own file, a timm checkpoint, a Hugging Face folder as timm writes it, a
            plain state_dict (.pt, .pth, .safetensors), or a name such as `resnet18.a1_in1k`.
        model: a fresh instance of your own class, for files that `save` wrote of one; its layers
            take the stored widths and weights.
        arch: timm's name of the network, or `torchvision/NAME`, for files that don't say it; one
            that `save` wrote of a bare network, pruned or not, fits the stored widths.
        model_kwargs: arguments for the builder of `arch`.
        cifar_stem: 3x3 stride-1 stem without max-pool, for small images.
        mean, std: normalisation per channel for images in [0, 1]; default: what the file says,
            else timm's configuration of the network.
        input_size: (channels, height, width) of the images.
        trust_pickle: unpickle whole modules; this runs whatever code the file brings.
        device: where to put the model.

    Returns:
        A module in eval mode that takes images in [0, 1], [N, C, H, W], and gives logits [N, K].

    Raises:
        ModelError: the file or the architecture does not fit, with what to change.
        UnsafeFileError: the file is a pickled module and `trust_pickle` was not given.
    """
    return open_model(
        path_or_name,
        model=model,
        arch=arch,
        model_kwargs=model_kwargs,
        cifar_stem=cifar_stem,
        mean=mean,
        std=std,
        input_size=input_size,
        trust_pickle=trust_pickle,
        device=device,
    )[0]


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
) -> tuple[nn.Module, dict[str, Any]]:
    """Like `load`, and return the record stored with the model beside it (empty if none)."""
    name = str(path_or_name)
    if not Path(name).exists() and is_name(name):
        spec = resolve_spec(name, model_kwargs, cifar_stem=cifar_stem, mean=mean, std=std)
        spec = replace(spec, input_size=input_size or default_input_size(spec))
        return build_model(spec, pretrained=True).to(device).eval(), {}
    if not Path(name).exists():
        raise ModelError(f"{name}: no such file or folder, nor a network of timm{similar(name)}")
    found = read(path_or_name, trust_pickle=trust_pickle)
    record = dict(found.manifest)
    if model is not None:
        loaded: nn.Module = _into_own_class(model, found)
    elif found.kind == "robust-prune" and not (arch and _is_custom(found)):
        loaded = _from_manifest(found)
    elif found.module is not None:
        loaded = _identify(found.module, mean, std)
        record["assumed"] = [_pickle_note(loaded, mean is not None)]
    else:
        loaded = _from_state(found, arch, model_kwargs, cifar_stem, mean, std)
        if mean is None and not found.pretrained_cfg.get("mean"):
            record["assumed"] = [
                f"normalisation assumed: timm's for {loaded.spec.arch}, mean {loaded.spec.mean}, "
                f"std {loaded.spec.std}; the file does not say, --mean and --std do"
            ]
    if found.notes:
        record["assumed"] = [*record.get("assumed", ()), *found.notes]
    if isinstance(loaded, ImageModel):
        loaded = _override(loaded, mean, std, input_size)
    else:
        loaded = _normalised(loaded, mean, std)
    make_contiguous_(loaded)
    return loaded.to(device).eval(), record


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
    if isinstance(model, ImageModel):
        spec = model.spec
    else:
        cls = type(model)
        spec = ModelSpec(source="custom", arch=f"{cls.__module__}.{cls.__qualname__}")
    manifest = {
        **to_plain(dict(record or {})),
        "model": to_plain(spec),
        "fields": fields_of(network_of(model)),
        "versions": library_versions(),
    }
    return write(path, network_of(model).state_dict(), manifest)


def _from_manifest(found: Checkpoint) -> nn.Module:
    try:
        spec = ModelSpec.from_plain(found.manifest["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{found.path}: its manifest is malformed: {error}") from None
    check_stored(found.path, spec.arch, spec.kwargs)
    model = build_model(spec)
    _load_state(model, found)
    return model


def _pickle_note(loaded: nn.Module, given: bool) -> str:
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


def _into_own_class(model: nn.Module, found: Checkpoint) -> nn.Module:
    """Fill a fresh instance of the user's class, behind the normalisation stored with it."""
    _load_state(model, found)
    stored = found.manifest.get("model", {})
    if stored.get("mean") and not isinstance(model, ImageModel):
        return ImageModel(model, ModelSpec.from_plain(stored))
    return model


def _is_custom(found: Checkpoint) -> bool:
    """Return whether the file holds a class that only its user can build."""
    stored = found.manifest.get("model", {})
    return isinstance(stored, Mapping) and stored.get("source") == "custom"


def _from_state(
    found: Checkpoint,
    arch: str | None,
    model_kwargs: Mapping[str, Any] | None,
    cifar_stem: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> ImageModel:
    check_stored(found.path, None if arch else found.arch, found.kwargs)
    arch = arch or found.arch
    if arch is None:
        name, tensor = next(iter(found.state.items()))
        raise ModelError(
            f"{found.path}: a plain state_dict of {len(found.state)} tensors ({name} "
            f"{list(tensor.shape)}, ...) does not say its architecture: add --arch NAME (a timm "
            "name, or torchvision/NAME) and, if it needs them, --model-kwargs '{...}'"
        )
    kwargs = {**found.kwargs, **(model_kwargs or {})}
    kwargs = {**infer_kwargs(arch, kwargs, found.state), **kwargs}
    mean = mean or found.pretrained_cfg.get("mean")
    std = std or found.pretrained_cfg.get("std")
    spec = resolve_spec(arch, kwargs, cifar_stem=cifar_stem, mean=mean, std=std)
    if size := found.pretrained_cfg.get("input_size"):
        spec = replace(spec, input_size=(int(size[0]), int(size[1]), int(size[2])))
    model = build_model(spec)
    _check_stem(found, model, cifar_stem)
    _load_state(model, found, exact=found.kind != "robust-prune")
    return model


def _check_stem(found: Checkpoint, model: ImageModel, cifar_stem: bool) -> None:
    theirs, mine = found.state.get("conv1.weight"), getattr(model.net, "conv1", None)
    if theirs is None or not isinstance(mine, nn.Conv2d) or theirs.shape == mine.weight.shape:
        return
    if theirs.shape[-1] == 3 and not cifar_stem:
        raise ModelError(
            f"{found.path}: its stem conv1 is 3x3, that of {model.spec.arch} is 7x7: "
            "it was made for small images, add --cifar-stem"
        )


def _load_state(model: nn.Module, found: Checkpoint, *, exact: bool = False) -> None:
    """Put the stored weights into the model; with `exact`, widths must already be the same."""
    net = network_of(model)
    if not exact:
        fit_(net, found.state)
        fields = found.manifest.get("fields", {})
        if not isinstance(fields, Mapping) or not all(
            isinstance(values, Mapping) for values in fields.values()
        ):
            raise ModelError(f"{found.path}: its manifest is malformed: fields")
        set_fields_(net, fields)
    try:
        state = OrderedDict(found.state)
        # some classes ask for the version of their state
        state._metadata = getattr(net.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
        problems = net.load_state_dict(state, strict=False)
    except RuntimeError as error:
        lines = str(error).splitlines()
        detail = lines[1].strip() if len(lines) > 1 else lines[0]
        raise ModelError(
            f"{found.path}: {len(lines) - 1} tensors have other shapes than the network built: "
            f"{detail[:200]}; check --arch and --model-kwargs"
        ) from None
    missing, unexpected = problems.missing_keys, problems.unexpected_keys
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        example = f"missing {missing[0]}" if missing else f"unexpected {unexpected[0]}"
        raise ModelError(
            f"{found.path}: does not fit the network built: {len(missing)} names missing, "
            f"{len(unexpected)} unexpected ({example}); check --arch and --model-kwargs"
        )


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


@torch.no_grad()
def _identify(
    module: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
) -> nn.Module:
    """Find the spec of an unpickled timm module, so that it can be stored without pickle.

    The rebuilt network must have the same weights by name and shape, and the same outputs.
    """
    if isinstance(module, ImageModel):
        return module
    config = getattr(module, "pretrained_cfg", None) or {}
    arch = config.get("architecture") if isinstance(config, Mapping) else None
    known = isinstance(arch, str) and is_name(arch)
    theirs = config if isinstance(config, Mapping) else {}
    mean, std = mean or theirs.get("mean"), std or theirs.get("std")
    state = module.state_dict()
    for cifar_stem in (False, True) if known else ():
        assert isinstance(arch, str)
        with contextlib.suppress(ModelError, RuntimeError):
            spec = resolve_spec(arch, infer_kwargs(arch, {}, state), cifar_stem=cifar_stem)
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
                    return candidate
    return _normalised(module, mean, std) if mean and std else module


def _normalised(
    module: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
) -> nn.Module:
    """Put a class of one's own behind the normalisation that is given, if any."""
    if mean is None and std is None:
        return module
    if mean is None or std is None:
        raise UsageError("a normalisation is a mean and a std, one value per channel; give both")
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
