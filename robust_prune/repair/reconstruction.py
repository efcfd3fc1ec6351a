"""Weights that make up for removed channels: least squares on the dense model's activations."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robust_prune.graph import ModelGraph
from robust_prune.modules import (
    as_memory_allows,
    batch_norms,
    channels_last,
    device_of,
    evaluating,
    network_of,
    takes_channels_last,
    watching,
)
from robust_prune.repair.anchors import Anchor, anchors_of, mean_and_variance
from robust_prune.repair.layers import fittable, inputs_at, outputs_at, places_of
from robust_prune.repair.sizes import Sizes
from robust_prune.repair.solving import solved_by_fewer
from robust_prune.types import PruningPlan

RIDGE = 0.1  # of the mean squared input
POSITIONS = 32  # of each image, drawn at random, that a layer is fitted on
STAND_IN_ROWS = 2048  # for a layer, where its maps have as many positions
WHAT = "reconstruction", "that is all of them"
Rows = tuple[Tensor, Tensor]  # indices of outputs, and the factor of each


@dataclass(frozen=True)
class Fit:
    """One layer's relative squared error against its dense outputs, before and after the fit."""

    layer: str
    before: float
    after: float


@dataclass(frozen=True)
class Moments:
    """What a layer gave at sampled positions of the dense model's forward pass.

    `positions` are drawn from the `places` of a map or a row of tokens; None takes all. `outputs`
    is [rows, out]. `gram` [in, in] is the mean of x x^T of what it read, where an input is an
    in-channel at a place of the kernel; empty where it was not asked for. `free` says that a bias
    or a batch norm behind the layer takes up means; they are taken off both then.
    """

    positions: Tensor | None
    places: int
    outputs: Tensor
    gram: Tensor
    free: bool


@torch.no_grad()
def dense_moments(
    model: nn.Module, images: Tensor, *, grams: bool = False, most: int = POSITIONS
) -> dict[str, Moments]:
    """Run the dense model once and keep by layer what `reconstruct_` aims at.

    Args:
        model: left as it was.
        images: [N, C, H, W] in [0, 1]; adversarial and clean ones.
        grams: keep second moments of inputs, too.
        most: positions of each image, drawn at random; all where there are fewer.

    Returns:
        Layers that one call with plain weights computes: no grouped convolutions, no weights
        used twice, and at most `layers.MOST_INPUTS` inputs.
    """
    found: dict[str, Moments] = {}
    means: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    generator = torch.Generator().manual_seed(0)
    latest: list[tuple[str, weakref.ref[Tensor]]] = []

    def look(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        places = places_of(layer, y)
        positions = None
        if places > most:
            drawn = torch.randperm(places, generator=generator)[:most]
            positions = drawn.sort().values.to(y.device)
        gram = y.new_empty(0)
        if grams:
            rows = inputs_at(layer, x, positions)
            means[name] = rows.mean(0)
            gram = rows.T @ rows / len(rows)
        outputs = outputs_at(layer, y, positions)
        found[name] = Moments(positions, places, outputs, gram, layer.bias is not None)
        latest[:] = [(name, weakref.ref(y))]

    def normalise(_: str, norm: nn.Module, x: Tensor) -> None:
        for name, output in latest:
            if output() is x:
                found[name] = replace(found[name], free=True)

    with (
        evaluating(model),
        watching(fittable(model), after=look),
        watching(batch_norms(model), before=normalise),
    ):
        model(images.to(device_of(model)))
    return {
        name: replace(m, gram=m.gram - torch.outer(means[name], means[name]))
        if grams and m.free
        else m
        for name, m in found.items()
        if calls[name] == 1
    }


@torch.no_grad()
def reconstruct_(
    model: nn.Module,
    dense: Mapping[str, Moments],
    rows: Mapping[str, Rows],
    images: Tensor,
    *,
    ridge: float = RIDGE,
    anchors: Mapping[str, Anchor] | None = None,
) -> tuple[Fit, ...]:
    """Fit the weights of a pruned model, in place, to the dense model's activations.

    Layer by layer, in the order of the forward pass, W' minimises over the sampled rows

        mean ||y - W' x'||^2 + ridge * mean(x'^2) * ||W' - W||^2

    with y what the dense layer gave (of the output channels that are left), x' what the pruned
    layer now reads, errors of the layers before it included, and W its weights as they are.
    Where a bias or a batch norm takes up means, they are taken off both first: biases are set so
    that the means agree, and batch-norm statistics are those of these images. One forward pass in
    all.

    Source: least squares as in He et al., "Channel pruning for accelerating very deep neural
    networks", ICCV 2017; ours: all layers, ridge towards the weights, adversarial images.

    Args:
        model: pruned; left in the mode it was in.
        dense: `dense_moments` on the same images.
        rows: `kept_rows` of the plan, made before pruning.
        images: [N, C, H, W] in [0, 1].
        ridge: how strongly weights stay; larger for fewer images.
        anchors: statistics of the dense model's batch norms, for images of another kind than it
            was trained on; statistics move from there as they move on these images.

    Returns:
        The relative squared errors of every layer that was fitted, in forward order.
    """
    fits: list[Fit] = []
    layers = {n: m for n, m in fittable(model).items() if n in dense}

    def fit(name: str, layer: nn.Module, x: Tensor) -> None:
        target, y = dense[name], dense[name].outputs
        if name in rows:
            kept, factors = (part.to(y.device) for part in rows[name])
            y = y[:, kept] * factors.to(y)
        if isinstance(layer, nn.Linear) and places_of(layer, x) != target.places:
            return  # its rows are channels that are gone: it mixes tokens
        x = inputs_at(layer, x, target.positions)
        fits.append(_fit_(name, layer, x, y, ridge, target.free))

    def renew(name: str, norm: nn.Module, x: Tensor) -> None:
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is not None and norm.running_var is not None:
            if anchors is None:
                mean, variance = mean_and_variance(x)
            else:
                kept = rows[name][0] if name in rows else None
                mean, variance = anchors[name].moved(*mean_and_variance(x), kept, norm.eps)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)

    with (
        evaluating(model),
        watching(layers, before=fit),
        watching(batch_norms(model), before=renew),
    ):
        model(images.to(device_of(model)))
    return tuple(fits)


@dataclass(frozen=True)
class Reconstruction:
    """Images [N, C, H, W] in [0, 1], and what the dense model makes of them, layer by layer.

    `anchors` are there where the images are of another kind than those the model was trained on.
    `quick` fits in passes channels last, where the model takes them.
    """

    images: Tensor
    dense: Mapping[str, Moments]
    anchors: Mapping[str, Anchor] | None = None
    quick: bool = False

    @classmethod
    def of(cls, model: nn.Module, images: Tensor) -> Reconstruction:
        """Run the dense model on as many of these images as one pass can take."""
        quick = takes_channels_last(model, images[:1])
        sizes = Sizes.of(model, images[:1])

        def run(size: int) -> Reconstruction:
            most = sizes.positions(size, POSITIONS)
            with channels_last(model, quick):
                dense = dense_moments(model, images[:size], most=most)
            return cls(images[:size], dense, quick=quick)

        return as_memory_allows(run, sizes.images(len(images)), *WHAT, ahead=False)

    @classmethod
    def of_stand_ins(cls, model: nn.Module, images: Tensor) -> Reconstruction:
        """Do so on few images of another kind, with more positions of each."""
        quick = takes_channels_last(model, images[:1])
        sizes = Sizes.of(model, images[:1])

        def run(size: int) -> Reconstruction:
            most = sizes.positions(size, max(POSITIONS, STAND_IN_ROWS // size))
            with anchors_of(model) as anchors, channels_last(model, quick):
                dense = dense_moments(model, images[:size], most=most)
            return cls(images[:size], dense, anchors, quick)

        return as_memory_allows(run, sizes.images(len(images)), *WHAT, ahead=False)

    def apply_(self, pruned: nn.Module, rows: Mapping[str, Rows]) -> tuple[Fit, ...]:
        """Fit the weights of the pruned model; see `reconstruct_`."""
        with channels_last(pruned, self.quick):
            return reconstruct_(
                pruned,
                self.dense,
                rows,
                self.images,
                anchors=self.anchors,
            )


@dataclass(frozen=True)
class Repaired:
    """What a pruned model holds once its layers are fitted: tensors by name, and the fits."""

    tensors: Mapping[str, Tensor]
    fits: tuple[Fit, ...]

    @classmethod
    def of(cls, pruned: nn.Module, fits: tuple[Fit, ...]) -> Repaired:
        """Keep parameters, which must not change any more, and a copy of buffers."""
        parameters = {name: p.detach() for name, p in pruned.named_parameters()}
        buffers = {name: b.detach().clone() for name, b in pruned.named_buffers()}
        return cls({**parameters, **buffers}, fits)

    @torch.no_grad()
    def put_into_(self, pruned: nn.Module) -> None:
        """Give them to a model that the same plan was applied to.

        What a module keeps of its last pass is no repair: it has another size then.
        """
        for name, tensor in _tensors(pruned).items():
            if tensor.shape == self.tensors[name].shape:
                tensor.copy_(self.tensors[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def kept_rows(graph: ModelGraph, plan: PruningPlan) -> dict[str, Rows]:
    """Return by layer which of the dense layer's outputs are left, and what they are multiplied by.

    Batch norms are among them with the channels that are left, and blocks that go whole with those
    of what they add to. The graph's model must not be pruned yet.
    """
    sizes = {n: t.shape for n, t in network_of(graph.model).state_dict().items()}
    kept: dict[str, Tensor] = {}
    empty = {b.like: b.name for b in graph.empty_blocks(plan.widths)}
    for group, gone in graph.dropped(plan).items():
        for slot in graph.slots(group):
            makes = slot.role == "out" and slot.tensor == f"{slot.layer}.weight"
            names = [slot.layer] if makes or slot.tensor == f"{slot.layer}.running_mean" else []
            if (slot.tensor, slot.dim) in empty:
                names.append(empty[slot.tensor, slot.dim])
            for name in names:
                whole = torch.ones(sizes[slot.tensor][slot.dim], dtype=torch.bool)
                kept.setdefault(name, whole)[slot.indices[gone[slot.units]]] = False
    scaled = graph.scaled_rows(plan)
    rows = {}
    for layer, mask in kept.items():
        factors = torch.ones(len(mask))
        for indices, factor in scaled.get(f"{layer}.weight", ()):
            factors[indices] = factor
        rows[layer] = mask.nonzero().squeeze(1), factors[mask]
    return rows


def _fit_(name: str, layer: nn.Module, x: Tensor, y: Tensor, ridge: float, free: bool) -> Fit:
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    old = layer.weight.flatten(1)
    x_mean, y_mean = x.mean(0), y.mean(0)
    if free:
        x, y = x - x_mean, y - y_mean
    energy = float(y.square().mean(0).sum()) or 1.0
    before, new = solved_by_fewer(x, y, old, ridge)
    if new is not None:
        layer.weight.copy_(new.view_as(layer.weight))
    after = float((y - x @ layer.weight.flatten(1).T).square().mean(0).sum())
    if layer.bias is not None:
        layer.bias.copy_(y_mean - layer.weight.flatten(1) @ x_mean)
    return Fit(name, before / energy, after / energy)
