"""Photographs that are installed anyway, and crops of them at any size."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from robust_prune.data.datasets import Size
from robust_prune.data.samples import sample_photographs

FEWEST_PIXELS = 32  # along a crop; fewer show nothing but a colour
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601


def photographs() -> list[Tensor]:
    """Return the photographs at hand, each [3, H, W] in [0, 1]; nothing is downloaded.

    Two come with scikit-learn, which is always there; a third with matplotlib, unless whoever
    packed it left its sample data out.
    """
    found = sample_photographs()
    matplotlib = importlib.util.find_spec("matplotlib")  # located, not imported
    if matplotlib is not None and matplotlib.origin is not None:
        path = Path(matplotlib.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"
        if path.exists():
            with Image.open(path) as image:
                found.append(np.asarray(image.convert("RGB")))
    return [torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 for image in found]


def crops(n: int, size: Size, seed: int) -> Tensor:
    """Return random square crops of the photographs at hand, half of them mirrored.

    Their sides are log-uniform, from half the size asked (at least `FEWEST_PIXELS`) to the whole
    photograph; they are resized with antialiasing.

    Args:
        n: how many.
        size: (channels, height, width); one channel is luminance, of others than three each takes
            red, green or blue in turn.
        seed: of every draw.

    Returns:
        [n, C, H, W] in [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    pictures = [in_channels(picture, size[0]) for picture in photographs()]
    return torch.stack([_crop(pictures, size, generator) for _ in range(n)])


def in_channels(picture: Tensor, channels: int) -> Tensor:
    """Return a picture [3, H, W] as [channels, H, W]."""
    if channels == 1:
        return (picture * picture.new_tensor(LUMINANCE).view(3, 1, 1)).sum(0, keepdim=True)
    return picture[torch.arange(channels) % 3]


def _crop(pictures: list[Tensor], size: Size, generator: torch.Generator) -> Tensor:
    def below(end: int) -> int:
        return int(torch.randint(end, (1,), generator=generator))

    picture = pictures[below(len(pictures))]
    height, width = picture.shape[1:]
    whole = min(height, width)
    least = min(max(FEWEST_PIXELS, max(size[1:]) // 2), whole)
    share = float(torch.rand(1, generator=generator))
    side = round(least * (whole / least) ** share)
    top, left = below(height - side + 1), below(width - side + 1)
    part = picture[None, :, top : top + side, left : left + side]
    resized = F.interpolate(
        part, size=size[1:], mode="bilinear", antialias=True, align_corners=False
    )[0]
    return (resized.flip(-1) if below(2) else resized).clamp(0, 1)
