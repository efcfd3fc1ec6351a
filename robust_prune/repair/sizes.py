"""How much of a model's activations reconstruction looks at in one pass, and keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_prune.modules import device_of, evaluating, watching
from robust_prune.repair.layers import fittable, places_of

PASS_BYTES = 1 << 30
KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class Sizes:
    """What layers that can be fitted make of one image.

    `largest` is the most values that one of them reads or gives, `outputs` has by layer the places
    and the channels of what it gives, and `weights` is the bytes of the model's parameters.
    """

    largest: int
    outputs: tuple[tuple[int, int], ...]
    weights: int

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, image: Tensor) -> Sizes:
        """Look at them while the model runs on an image [1, C, H, W]."""
        largest = [image.numel()]
        outputs: dict[str, tuple[int, int]] = {}

        def look(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
            # the patches of a convolution are unfolded, a part of the images at a time
            largest.append(max(x.numel(), y.numel()))
            places = places_of(layer, y)
            outputs[name] = places, y.numel() // (len(y) * places)

        with evaluating(model), watching(fittable(model), after=look):
            model(image.to(device_of(model)))
        weights = sum(p.nbytes for p in model.parameters())
        return cls(max(largest), tuple(outputs.values()), weights)

    def images(self, most: int) -> int:
        """Return how many one pass can take while its largest activation stays under 1 GiB."""
        return max(1, min(most, PASS_BYTES // (4 * self.largest)))

    def positions(self, images: int, most: int) -> int:
        """Return how many positions of each image can be kept.

        All layers together keep at most 1 GiB, or half of what the weights take where that is more.
        """
        limit = max(KEPT_BYTES, self.weights // 2)
        while most > 1 and 4 * images * self._values(most) > limit:
            most -= 1
        return most

    def _values(self, positions: int) -> int:
        return sum(width * min(places, positions) for places, width in self.outputs)
