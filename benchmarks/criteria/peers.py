"""torch-pruning's own criteria, as its users run them, bisected to the same multiply-adds."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

import robust_prune as rp
from robust_prune.adversaries import AdversarialSet
from robust_prune.errors import ModelError
from robust_prune.graph import count_cost
from robust_prune.modules import ImageModel, device_of, make_contiguous_, requires_grad

HESSIAN_IMAGES = 64  # one backward pass for each
TOLERANCE, FARTHEST = 0.002, 0.02
HALVINGS = 12


@dataclass(frozen=True)
class Peer:
    """An arm: torch-pruning's importance, ranked in each group or over the whole network."""

    name: str
    importance: Callable[[], Any]
    everywhere: bool = True
    gradients: str = ""  # "clean" or "adversarial" batches; "each" for one image at a time


_imp = tp.importance
PEERS = (
    Peer("tp-random", _imp.RandomImportance, everywhere=False),
    Peer("tp-l1-local", lambda: _imp.MagnitudeImportance(p=1), everywhere=False),
    Peer("tp-l1-global", lambda: _imp.MagnitudeImportance(p=1)),
    Peer("tp-l2-local", lambda: _imp.MagnitudeImportance(p=2), everywhere=False),
    Peer("tp-l2-global", lambda: _imp.MagnitudeImportance(p=2)),
    Peer("tp-lamp", lambda: _imp.LAMPImportance(p=2)),
    Peer("tp-fpgm", lambda: _imp.FPGMImportance(p=2)),
    Peer("tp-bn-scale", _imp.BNScaleImportance),
    Peer("tp-group-norm", lambda: _imp.GroupMagnitudeImportance(p=2, normalizer="gaussian")),
    Peer("tp-taylor", _imp.TaylorImportance, gradients="clean"),
    Peer("tp-hessian", _imp.HessianImportance, gradients="each"),
    Peer("tp-taylor-adversarial", _imp.TaylorImportance, gradients="adversarial"),
)


def prune(
    model: ImageModel,
    peer: Peer,
    ratio: float,
    size: tuple[int, int, int],
    adversarial: AdversarialSet,
    clean: Tensor,
    seed: int,
    *,
    our_graph: bool = False,
) -> ImageModel:
    """Return a copy pruned in one shot; `ratio` of the multiply-adds is gone, as near as it gets.

    torch-pruning's knob is the share of channels; it is bisected on our count of multiply-adds.
    With `our_graph` its pruner works on this package's graph, which knows more networks.

    Raises:
        ModelError: torch-pruning can't prune this network so far, in its own words.
    """
    dense = count_cost(model, size).macs
    low, high = 0.0, 1.0
    best: tuple[float, ImageModel] | None = None
    problem = ""
    for _ in range(HALVINGS):
        share = (low + high) / 2
        try:
            pruned = _prune_once(
                model, peer, share, size, adversarial, clean, seed, our_graph=our_graph
            )
            reached = 1 - count_cost(pruned, size).macs / dense
        except Exception as error:  # noqa: BLE001 (whatever it raises is its result)
            problem = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
            high = share
            continue
        miss = abs(reached - ratio)
        if best is None or miss < best[0]:
            best = miss, pruned
        if miss < TOLERANCE:
            break
        low, high = (share, high) if reached < ratio else (low, share)
    if best is None:
        raise ModelError(f"torch-pruning: {problem}")
    if best[0] > FARTHEST:
        raise ModelError(f"torch-pruning comes no closer than {100 * best[0]:.1f} points {problem}")
    return best[1]


def _prune_once(
    model: ImageModel,
    peer: Peer,
    share: float,
    size: tuple[int, int, int],
    adversarial: AdversarialSet,
    clean: Tensor,
    seed: int,
    *,
    our_graph: bool,
) -> ImageModel:
    copied = copy.deepcopy(model).eval()
    importance = peer.importance()
    example = torch.rand(2, *size, device=device_of(model))
    attentions: list[Any] = [m for m in copied.modules() if _is_attention(m) and not our_graph]
    with requires_grad(copied, True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _accumulate_gradients_(copied, peer, adversarial, clean)
        torch.manual_seed(seed)
        heads = {m.qkv: m.num_heads for m in attentions}
        with rp.dependency_graph() if our_graph else contextlib.nullcontext():
            pruner = tp.pruner.BasePruner(
                copied,
                example[:1],
                importance=importance,
                global_pruning=peer.everywhere,
                pruning_ratio=share,
                ignored_layers=[_classifier(copied, model.spec.num_classes)],
                num_heads=heads,
            )
        pruner.step()
    for module in attentions:  # what torch-pruning's own examples do after pruning
        module.num_heads = pruner.num_heads[module.qkv]
        module.head_dim = module.qkv.out_features // (3 * module.num_heads)
        module.attn_dim = module.head_dim * module.num_heads
    for parameter in copied.parameters():
        parameter.grad = None
    make_contiguous_(copied)
    with torch.no_grad():
        copied(example)
    return copied


def _accumulate_gradients_(
    model: nn.Module, peer: Peer, adversarial: AdversarialSet, clean: Tensor
) -> None:
    """Leave in `grad` what the importance reads: gradients, or means of squared ones.

    HessianImportance.accumulate_grad of torch-pruning 1.6.1 keeps the last image alone (it looks
    for names in a dictionary of parameters), so squares are averaged here; the importance takes
    `grad` for them when it has accumulated nothing itself.
    """
    if not peer.gradients:
        return
    images = adversarial.images if peer.gradients == "adversarial" else clean
    images, labels = images.to(device_of(model)), adversarial.labels
    if peer.gradients != "each":
        for part, target in zip(torch.split(images, 128), torch.split(labels, 128), strict=True):
            loss = F.cross_entropy(model(part), target, reduction="sum") / len(labels)
            loss.backward()  # type: ignore[no-untyped-call]
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    squares = [torch.zeros_like(p) for p in parameters]
    n = min(HESSIAN_IMAGES, len(labels))
    for image, label in zip(images[:n], labels[:n], strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        for total, gradient in zip(squares, torch.autograd.grad(loss, parameters), strict=True):
            total += gradient.square() / n
    for parameter, total in zip(parameters, squares, strict=True):
        parameter.grad = total


def _is_attention(module: Any) -> bool:
    return hasattr(module, "qkv") and hasattr(module, "num_heads")


def _classifier(model: nn.Module, classes: int) -> nn.Module:
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == classes][
        -1
    ]
