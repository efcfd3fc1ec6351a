"""Batch-norm statistics that move as they move on images of another kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robust_prune.modules import batch_norms, watching


@dataclass(frozen=True)
class Anchor:
    """A dense batch norm's own statistics, and those of what it reads on other images.

    All are [channels]; the own ones are what training left, the others are `read_`.
    """

    mean: Tensor
    variance: Tensor
    read_mean: Tensor
    read_variance: Tensor

    def moved(
        self, mean: Tensor, variance: Tensor, kept: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return statistics for a pruned norm that reads `mean` and `variance` on these images.

        Images that stand in for data have other statistics than data. What pruning changed is told
        by how they differ from the dense model's on the same images: means by a difference,
        variances by a factor. On the training images themselves this is what is measured there.

        Args:
            mean: [kept channels] of what the pruned norm reads.
            variance: [kept channels].
            kept: indices of the dense channels that are left; None for all.
            eps: the norm's.
        """
        own_mean, own, read_mean, read = (
            part if kept is None else part[kept.to(part.device)]
            for part in (self.mean, self.variance, self.read_mean, self.read_variance)
        )
        return own_mean + mean - read_mean, own * (variance + eps) / (read + eps)


@contextmanager
def anchors_of(model: nn.Module) -> Iterator[dict[str, Anchor]]:
    """Fill the dictionary with the anchors of all batch norms in the next forward pass."""
    found: dict[str, Anchor] = {}

    def note(name: str, norm: nn.Module, x: Tensor) -> None:
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is not None and norm.running_var is not None:
            found[name] = Anchor(
                norm.running_mean.clone(), norm.running_var.clone(), *mean_and_variance(x)
            )

    with watching(batch_norms(model), before=note):
        yield found


def mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return [channels] each of x [N, channels, ...]; `var` takes two to six times as long."""
    dims = [d for d in range(x.ndim) if d != 1]
    mean = x.mean(dims, keepdim=True)
    count = x.numel() // x.shape[1]
    return mean.flatten(), (x - mean).square_().sum(dims) / max(count - 1, 1)
