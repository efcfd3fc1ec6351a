"""Which network a file's weights belong to, and with which arguments it is built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robust_prune.errors import ModelError
from robust_prune.models.builders import (
    TORCHVISION,
    builders_of,
    check_stored,
    counts_of,
    is_name,
    state_shapes,
)
from robust_prune.models.manifest import check_arguments
from robust_prune.models.matching import WeightSet, find_sets
from robust_prune.models.reading import ModelFile

NAMING = ("arch", "architecture", "model", "model_name", "backbone", "net", "network", "name")
ARGUMENTS = ("model_kwargs", "model_args")
MOST_TRIED = 12


@dataclass(frozen=True)
class Candidate:
    """A network that a file may hold; `bare` where it was named without `torchvision/`."""

    arch: str
    kwargs: Mapping[str, Any]
    bare: bool = False


@dataclass(frozen=True)
class Matched:
    """A candidate and where its weights are: whole sets, or the nearest to one."""

    candidate: Candidate
    wanted: Mapping[str, Tensor]
    sets: tuple[WeightSet, ...]

    @property
    def whole(self) -> bool:
        """Whether a set has everything that the network needs."""
        return bool(self.sets) and not self.sets[0].missing

    @property
    def missing(self) -> int:
        """How many names the nearest set lacks."""
        return len(self.sets[0].missing) if self.sets else len(self.wanted)


def identify(found: ModelFile, arch: str | None, model_kwargs: Mapping[str, Any] | None) -> Matched:
    """Find the network whose names the file has: of the one asked for, or of those it records.

    Raises:
        ModelError: no name is known, or none of them can be built.
    """
    best: Matched | None = None
    errors: list[ModelError] = []
    for candidate in _candidates(found, arch, dict(model_kwargs or {})):
        try:
            wanted = state_shapes(candidate.arch, candidate.kwargs)
        except ModelError as error:
            errors.append(error)
            continue
        matched = Matched(candidate, wanted, tuple(find_sets(found.content, wanted)))
        if matched.whole:
            return matched
        if best is None or matched.missing < best.missing:
            best = matched
    if best is not None:
        return best
    raise errors[0] if errors else _unnamed(found)


def infer_kwargs(
    arch: str, kwargs: Mapping[str, Any], wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, int]:
    """Read the number of classes and of input channels off the weights.

    Which sizes depend on them is found out by building the network with one more.

    Args:
        arch: the builder.
        kwargs: its arguments; what they give is not inferred.
        wanted: the state of the network that these make.
        state: the file's, by the same names.
    """
    inferred: dict[str, int] = {}
    for argument, assumed in counts_of(arch, kwargs).items():
        differ = [n for n, t in state.items() if n in wanted and t.shape != wanted[n].shape]
        if argument in kwargs or (argument == "in_chans" and not differ):
            continue
        more = state_shapes(arch, {**kwargs, argument: assumed + 1})
        votes = Counter(
            count for name in state for count in _counts(name, assumed, wanted, more, state)
        )
        if not votes:
            continue
        count = votes.most_common(1)[0][0]
        if argument == "num_classes" or count != assumed:
            inferred[argument] = count
    return inferred


def _counts(
    name: str,
    assumed: int,
    wanted: Mapping[str, Tensor],
    more: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> Iterator[int]:
    """Yield what the file's sizes of one tensor say, along dimensions that follow the count."""
    if name not in wanted or name not in more:
        return
    sizes = wanted[name].shape, more[name].shape, state[name].shape
    if len({len(size) for size in sizes}) > 1:
        return
    for size, larger, here in zip(*sizes, strict=True):
        step = larger - size
        if step > 0 and (here - size) % step == 0 and assumed + (here - size) // step > 0:
            yield assumed + (here - size) // step


def _candidates(found: ModelFile, arch: str | None, given: dict[str, Any]) -> Iterator[Candidate]:
    named = list(_named(found))
    stored = dict(found.kwargs) or next((kwargs for _, kwargs in named if kwargs), {})
    if arch is not None:
        check_stored(found.path, None, stored)
        for name in builders_of(arch) or (arch,):
            yield Candidate(name, {**stored, **given}, name != arch)
        return
    if found.arch is not None:
        check_stored(found.path, found.arch, stored)
        for name in builders_of(found.arch) or (found.arch,):
            yield Candidate(name, {**stored, **given}, name != found.arch)
        return
    tried: dict[str, Candidate] = {}
    for name, kwargs in named:
        check_stored(found.path, name, kwargs)
        for builder in builders_of(name):
            candidate = Candidate(builder, {**(kwargs or stored), **given}, builder != name)
            tried.setdefault(builder, candidate)
    yield from list(tried.values())[:MOST_TRIED]


def _named(found: ModelFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, arguments beside it) of networks that settings name, the likeliest first."""
    settings = sorted(found.content.settings.items(), key=lambda item: item[0].count("."))
    outer = _arguments(found, dict(settings).get("", {}))
    ranked = []
    for _, entries in settings:
        kwargs = _arguments(found, entries) or outer
        for key, value in entries.items():
            if not isinstance(value, str) or not 1 < len(value) < 200:
                continue
            foreign = ":" in value and key in NAMING[:2]
            if foreign or (":" not in value and builders_of(value)) or _is_tagged(value):
                rank = NAMING.index(key) if key in NAMING else len(NAMING)
                ranked.append((rank, value, kwargs))
    for _, value, kwargs in sorted(ranked, key=lambda item: item[0]):
        yield value, kwargs


def _is_tagged(value: str) -> bool:
    return value.startswith(TORCHVISION) and is_name(value)


def _arguments(found: ModelFile, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the builder's arguments among settings, as timm's trainer stores them."""
    for key in ARGUMENTS:
        value = entries.get(key)
        if isinstance(value, Mapping) and value:
            kwargs = {str(name): argument for name, argument in value.items()}
            try:
                check_arguments(kwargs)
            except ValueError as error:
                raise ModelError(f"{found.path}: {key}: {error}") from None
            return kwargs
    pooling = entries.get("gp")  # timm's trainer: the kind of pooling
    return {"global_pool": pooling} if isinstance(pooling, str) and "model" in entries else {}


def _unnamed(found: ModelFile) -> ModelError:
    tensors = found.content.tensors
    name, tensor = next(iter(tensors.items()))
    said = next(
        (
            f"; it says {key!r} is {value[:60]!r}, which neither timm nor torchvision has"
            for entries in found.content.settings.values()
            for key, value in entries.items()
            if key in NAMING[:2] and isinstance(value, str)
        ),
        "",
    )
    return ModelError(
        f"{found.path}: a plain state_dict of {len(tensors)} tensors ({name} "
        f"{list(tensor.shape)}, ...) does not say its architecture{said}: add --arch NAME (a timm "
        "name, or torchvision/NAME) and, if it needs them, --model-kwargs '{...}'"
    )
