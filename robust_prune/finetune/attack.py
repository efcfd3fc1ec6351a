"""The attack that a training method is handed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.adversaries import Folded, Loss, pgd, random_start, steepest
from robust_prune.modules import batch_statistics, evaluating, requires_grad
from robust_prune.options import BatchNormMode
from robust_prune.types import ThreatModel


@dataclass(frozen=True)
class Attack:
    """Attacks with the settings of a training run, and the loss that it learns by.

    `batchnorm` says what batch norms do during the attack: `eval` uses running statistics, `train`
    those of the attacked batch (running statistics stay as they are). `folded` is a copy of the
    model with batch norms folded into convolutions, which eval-mode attacks go through. `bfloat16`
    computes attacks in it: a step needs the signs or the direction of a gradient, not its digits.
    """

    threat: ThreatModel
    steps: int
    generator: torch.Generator
    label_smoothing: float = 0.0
    batchnorm: BatchNormMode = "eval"
    folded: Folded | None = None
    bfloat16: bool = False

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, loss: Loss | None = None
    ) -> Tensor:
        """Return PGD images [N, C, H, W]; modes of the model are put back.

        Args:
            model: gives logits [N, K].
            images: [N, C, H, W] in [0, 1].
            labels: [N].
            loss: logits [N, K] -> loss [N] to maximise; cross-entropy if None.
        """
        with self.seen_by(model) as seen:
            return pgd(
                seen,
                images,
                labels,
                threat=self.threat,
                steps=self.steps,
                generator=self.generator,
                loss=loss,
            )

    def single_step(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return images [N, C, H, W] in [0, 1] after noise of 2 * eps and one step of eps.

        Source: de Jorge et al., "Make some noise: reliable and efficient single-step adversarial
        training", NeurIPS 2022, arXiv 2202.01181. As there, the sum is not projected to the ball;
        deviation: for l2 the step has norm eps.
        """
        threat = self.threat
        most = min(2 * threat.eps, 0.999) if threat.norm == "linf" else 2 * threat.eps
        wide = ThreatModel(threat.norm, most)
        noise = random_start(images, wide, self.generator)
        noisy = (images + noise).clamp(0, 1).requires_grad_(True)
        with self.seen_by(model) as seen, torch.enable_grad():
            loss = F.cross_entropy(seen(noisy), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, noisy)
        return (noisy.detach() + threat.eps * steepest(gradient, threat)).clamp(0, 1)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy that the run learns by, with its label smoothing."""
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    @contextlib.contextmanager
    def seen_by(self, model: nn.Module) -> Iterator[nn.Module]:
        """Give the module that an attack differentiates: `model` in the attack's mode, frozen."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(model))
            stack.enter_context(requires_grad(model, False))
            seen = model
            if self.batchnorm == "train":
                stack.enter_context(batch_statistics(model))
            elif self.folded is not None and self.folded.stands_for(model):
                seen = self.folded.refreshed()
            around = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
            yield _Autocast(seen, self.bfloat16) if self.bfloat16 or around else seen


class _Autocast(nn.Module):
    """A module whose forward pass runs in bfloat16 or not, whatever is around it.

    Logits come in the type of the images: losses are not for bfloat16.
    """

    def __init__(self, module: nn.Module, bfloat16: bool) -> None:
        super().__init__()
        self.module, self.enabled = module, bfloat16

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.enabled):
            logits: Tensor = self.module(images)
        return logits.to(images.dtype)


Method = Callable[[nn.Module, Tensor, Tensor, Attack], Tensor]
