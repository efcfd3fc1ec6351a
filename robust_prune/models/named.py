"""Networks built by a name, and filled with a file's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from robust_prune.errors import ModelError
from robust_prune.models.architecture import identify, infer_kwargs
from robust_prune.models.bounds import bounded
from robust_prune.models.builders import (
    build_model,
    resolve_spec,
)
from robust_prune.models.fitting import (
    check_stem,
    fill_,
    refill_,
)
from robust_prune.models.manifest import Manifest
from robust_prune.models.narrowing import Follow, narrow_to_, narrower
from robust_prune.models.normalisation import (
    Normalisation,
    image_size,
    size_from_settings,
    stored_normalisation,
)
from robust_prune.models.reading import ModelFile
from robust_prune.models.weights import take
from robust_prune.modules import (
    ImageModel,
)


@dataclass(frozen=True)
class Given:
    """What the user says of a file; None where nothing."""

    arch: str | None
    kwargs: Mapping[str, Any] | None
    cifar_stem: bool
    mean: Sequence[float] | None
    std: Sequence[float] | None


def from_state(
    found: ModelFile, given: Given, follow: Follow | None = None
) -> tuple[ImageModel, tuple[str, ...]]:
    """Build the network that is asked for, or that the file names, and fill it.

    Args:
        found: the file.
        given: what the user says of it.
        follow: as in `narrow_to_`.
    """
    path, content = found.path, found.content
    if given.arch and given.cifar_stem:  # fails where the network has no such stem
        build_model(resolve_spec(given.arch, given.kwargs, cifar_stem=True))
    with bounded(content):
        try:
            matched = identify(found, given.arch, given.kwargs)
        except ModelError as error:
            if given.arch or str(error).startswith(str(path)):
                raise
            raise ModelError(f"{path}: {error}") from None  # the name is the file's
        arch, kwargs = matched.candidate.arch, dict(matched.candidate.kwargs)
        weights = take(path, content, matched.wanted)
        kwargs = {**infer_kwargs(arch, kwargs, matched.wanted, weights.state), **kwargs}
        stored = stored_normalisation(path, found.pretrained_cfg, weights.channels)
        normalisation = weights.normalisation or stored
        mean, std = given.mean, given.std
        if normalisation is not None:
            mean, std = mean or normalisation.mean, std or normalisation.std
        spec = resolve_spec(arch, kwargs, cifar_stem=given.cifar_stem, mean=mean, std=std)
        size = image_size(found.pretrained_cfg.get("input_size"), weights.channels)
        size = size or size_from_settings(content, weights.channels)
        model = build_model(replace(spec, input_size=size))
    check_stem(model, path, weights.state)
    notes = [_normalisation_note(model, given, weights.normalisation, stored)]
    if matched.candidate.bare:
        notes.append(f"the network is {arch}; timm has none of that name with these weights")
    narrow = narrower(model.net, weights.state)
    if narrow:
        assumed = narrow_to_(model, path, weights.state, follow)
        notes.append(
            f"{len(narrow)} of {len(weights.state)} tensors are narrower than those of {arch}: the "
            "network was pruned elsewhere, and has the file's widths"
        )
        notes += assumed
    else:
        fill_(model.net, path, weights.state)
    return model, (*filter(None, notes), *weights.notes)


def by_arch(found: ModelFile, manifest: Manifest, given: Given) -> nn.Module:
    """Build a bare network, saved without its builder's name, by the name that is given."""
    tensors = found.content.tensors
    with bounded(found.content):
        matched = identify(found, given.arch, given.kwargs)
        arch, kwargs = matched.candidate.arch, dict(matched.candidate.kwargs)
        kwargs = {**infer_kwargs(arch, kwargs, matched.wanted, tensors), **kwargs}
        spec = resolve_spec(
            arch, kwargs, cifar_stem=given.cifar_stem, mean=given.mean, std=given.std
        )
        model = build_model(spec)
    refill_(model.net, found.path, tensors, manifest.fields, manifest.empty)
    return model


def _normalisation_note(
    model: ImageModel, given: Given, own: Normalisation | None, stored: Normalisation | None
) -> str:
    """Say where the normalisation is from, unless the user or timm's configuration said it."""
    if given.mean is not None:
        return ""
    if own is not None:
        return own.note
    if stored is not None:
        return ""
    whose = "timm's" if model.spec.source == "timm" else "ImageNet's,"
    return (
        f"normalisation assumed: {whose} for {model.spec.arch}, mean {model.spec.mean}, std "
        f"{model.spec.std}; the file does not say, --mean and --std do"
    )
