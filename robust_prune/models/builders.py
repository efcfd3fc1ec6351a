"""Networks of timm and torchvision by name, with the stem and normalisation they need."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from robust_prune.errors import ModelError, UsageError
from robust_prune.modules import ImageModel
from robust_prune.types import ModelSpec

TORCHVISION = "torchvision/"
AUXILIARY_HEADS = ("googlenet", "inception_v3")
# arguments that make a builder read other files or the network
READING_ARGUMENTS = (
    "cache_dir",
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_filter_fn",
    "pretrained_model_args",
    "weights",
    "weights_backbone",
)


def build_model(spec: ModelSpec, *, pretrained: bool = False) -> ImageModel:
    """Build the network that `spec` describes, with random or (timm's own) pretrained weights.

    The model's own spec is what timm builds it from without the Hub or other files.
    """
    net = _build_net(spec, pretrained)
    arch, kwargs = spec.arch, dict(spec.kwargs)
    if ":" in arch:
        arch, kwargs = net.pretrained_cfg["architecture"], {**net._model_args, **kwargs}
    kwargs = {name: value for name, value in kwargs.items() if name not in READING_ARGUMENTS}
    return ImageModel(net, replace(spec, arch=arch, kwargs=kwargs))


def check_stored(path: Path, arch: str | None, kwargs: Mapping[str, Any]) -> None:
    """Raise ModelError where a file's own name or arguments would have more read than the file."""
    if reading := [name for name in READING_ARGUMENTS if name in kwargs]:
        raise ModelError(
            f"{path}: its builder argument {reading[0]!r} can make timm read other files or the "
            "network, which no file may ask for; take it out of the file"
        )
    if arch is not None and ":" in arch:
        raise ModelError(
            f"{path}: its network {arch!r} would be read from elsewhere, which no file may ask "
            "for; name it yourself with --arch, or build it: load(path, model=NETWORK)"
        )


def library_versions() -> dict[str, str]:
    """Return the versions of the packages that numbers depend on."""
    from robust_prune._version import __version__

    return {
        "robust_prune": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "torchvision": torchvision.__version__,
    }


def resolve_spec(
    arch: str,
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    cifar_stem: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ModelSpec:
    """Complete a builder's name and arguments to a spec, from timm's configuration of it.

    The input size stays open: a file of weights does not tell it, the data does.
    """
    kwargs = dict(model_kwargs or {})
    if arch.startswith(TORCHVISION):
        default_mean: tuple[float, ...] = IMAGENET_MEAN
        default_std: tuple[float, ...] = IMAGENET_STD
        num_classes = int(kwargs.get("num_classes", 1000))
    else:
        config = _timm_config(arch, kwargs)
        channels = int(kwargs.get("in_chans", config["input_size"][0]))
        default_mean = per_channel(config["mean"], channels)
        default_std = per_channel(config["std"], channels)
        num_classes = int(kwargs.get("num_classes", config["num_classes"]))
    spec = ModelSpec(
        source="torchvision" if arch.startswith(TORCHVISION) else "timm",
        arch=arch.removeprefix(TORCHVISION),
        kwargs=kwargs,
        cifar_stem=cifar_stem,
        num_classes=num_classes,
        mean=tuple(mean or default_mean),
        std=tuple(std or default_std),
    )
    check_normalisation(spec)
    return spec


def default_input_size(spec: ModelSpec) -> tuple[int, int, int]:
    """Return (channels, height, width) to assume where neither file nor data tell."""
    channels = len(spec.mean) or 3
    if spec.cifar_stem:
        return channels, 32, 32
    if spec.source != "timm":
        return channels, 224, 224
    _, height, width = _timm_config(spec.arch, spec.kwargs)["input_size"]
    asked = spec.kwargs.get("img_size")
    if isinstance(asked, int):
        height = width = asked
    elif isinstance(asked, (list, tuple)) and len(asked) == 2:
        height, width = asked
    return channels, int(height), int(width)


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def is_name(name: str) -> bool:
    """Return whether this is the name of a network rather than of a file."""
    if name.startswith(("hf-hub:", TORCHVISION)):
        return True
    if name.endswith((".pt", ".pth", ".safetensors", ".bin", ".tar", ".ckpt")):
        return False
    return bool(timm.is_model(name.split(".")[0]))


def known_to_timm(arch: str) -> None:
    """Raise ModelError where timm has no network of this name, with those that are close."""
    if not arch.startswith("hf-hub:") and not timm.is_model(arch.split(".")[0]):
        raise ModelError(f"{arch!r} is not a network of timm {timm.__version__}{similar(arch)}")


def _timm_config(arch: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    known_to_timm(arch)
    with torch.device("meta"), _builder_errors(arch):
        net = timm.create_model(arch, **kwargs)
    return dict(net.pretrained_cfg)


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return a value per channel: those given, or their mean for each where the number differs."""
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels


def similar(name: str) -> str:
    """Return `; did you mean ...?` for a name that is close to networks of timm, else nothing."""
    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def check_normalisation(spec: ModelSpec) -> None:
    """Raise UsageError unless mean and std have a value for each channel."""
    channels = int(spec.kwargs.get("in_chans", spec.input_size[0] if spec.input_size else 3))
    if spec.source == "custom":
        channels = len(spec.mean)
    if len(spec.mean) != channels or len(spec.std) != channels:
        raise UsageError(
            f"mean has {len(spec.mean)} and std {len(spec.std)} values, but {spec.arch} takes "
            f"images of {channels} channels: give one value per channel"
        )
    if any(value <= 0 for value in spec.std):
        raise UsageError(f"std must be positive, not {spec.std}")


@contextlib.contextmanager
def _builder_errors(arch: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0][:200]
        raise ModelError(f"{arch}: can't be built: {type(error).__name__}: {line}") from error


def _build_net(spec: ModelSpec, pretrained: bool) -> Any:
    if spec.source == "custom":
        raise ModelError(
            f"the file holds a {spec.arch}, a class that only you can build: "
            "load(path, model=YourClass())"
        )
    kwargs = {"num_classes": spec.num_classes, **spec.kwargs}
    torchvisions = spec.source == "torchvision"
    net = _call_builder(spec.arch, kwargs, torchvisions=torchvisions, pretrained=pretrained)
    if spec.cifar_stem:
        _cifar_stem_(net, spec.arch)
    return net


def _call_builder(
    arch: str, kwargs: Mapping[str, Any], *, torchvisions: bool, pretrained: bool = False
) -> nn.Module:
    with _builder_errors(arch):
        if not torchvisions:
            net: nn.Module = timm.create_model(arch, pretrained=pretrained, **kwargs)
            return net
        if arch in AUXILIARY_HEADS:
            # their second heads return no logits [N, K] in train mode, and nothing in eval mode
            kwargs = {"aux_logits": False, "init_weights": False, **kwargs}
        weights = "DEFAULT" if pretrained else None
        other: nn.Module = torchvision.models.get_model(arch, weights=weights, **kwargs)
    return other


def state_shapes(arch: str, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state of the network that a builder makes: names, types and shapes, no values."""
    torchvisions = arch.startswith(TORCHVISION)
    if not torchvisions:
        known_to_timm(arch)
    with torch.device("meta"):
        net = _call_builder(arch.removeprefix(TORCHVISION), kwargs, torchvisions=torchvisions)
    state: dict[str, Tensor] = net.state_dict()
    return state


def counts_of(arch: str, kwargs: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of classes and, for timm, of input channels that a builder assumes."""
    if arch.startswith(TORCHVISION):
        return {"num_classes": int(kwargs.get("num_classes", 1000))}
    config = _timm_config(arch, kwargs)
    return {
        "num_classes": int(kwargs.get("num_classes", config["num_classes"])),
        "in_chans": int(kwargs.get("in_chans", config["input_size"][0])),
    }


def builders_of(name: str) -> tuple[str, ...]:
    """Return the networks that a bare name stands for: timm's, then torchvision's."""
    if ":" in name or name.startswith(TORCHVISION):
        return (name,)
    found = [name] if timm.is_model(name.split(".")[0]) else []
    if name in torchvision.models.list_models(module=torchvision.models):
        found.append(f"{TORCHVISION}{name}")
    return tuple(found)


def _cifar_stem_(net: Any, arch: str) -> None:
    """Make the stem fit small images: stride 1 and no pooling; 3x3 where it was one 7x7.

    MobileViT's second stage keeps its size, too: 4x4 maps are left of 32x32 images.
    """
    stem: Any = getattr(net, "stem", None)
    stages: Any = getattr(net, "stages", ())
    if isinstance(getattr(net, "maxpool", None), nn.Module) and hasattr(net, "conv1"):
        net.conv1 = _small_convolution(net.conv1)
        net.maxpool = nn.Identity()
    elif hasattr(stem, "pool") and hasattr(stem, "conv"):  # ResNetV2
        stem.conv, stem.pool = _small_convolution(stem.conv), nn.Identity()
    elif len(stages) > 1 and hasattr(stages[1][0], "conv2_kxk") and hasattr(stem, "conv"):
        stem.conv.stride = stages[1][0].conv2_kxk.conv.stride = (1, 1)
    else:
        raise ModelError(
            f"{arch}: --cifar-stem knows the stems of ResNet, ResNetV2 and MobileViT, and this "
            "network's is none of them; leave it out, or edit the stem of your own module from "
            "Python"
        )


def _small_convolution(stem: nn.Module) -> nn.Module:
    if isinstance(stem, nn.Sequential):
        first = stem[0]
        assert isinstance(first, nn.Conv2d)
        first.stride = (1, 1)
        return stem
    assert isinstance(stem, nn.Conv2d)
    small = type(stem)(stem.in_channels, stem.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
    return small
