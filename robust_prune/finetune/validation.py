"""What selects the best epoch: clean and robust accuracy on validation images."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robust_prune.distributed import Processes
from robust_prune.evaluation import pgd_correct, predict
from robust_prune.finetune.config import EpochRecord, TrainingConfig

VALIDATION_STEPS = 10


def validate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: TrainingConfig,
    processes: Processes,
    *,
    single_step: bool,
) -> EpochRecord:
    """Return clean, PGD-10 and, where asked, FGSM accuracy; epoch, loss and rate are not filled.

    Args:
        model: put into eval mode.
        images: [N, C, H, W] in [0, 1], the same in every process; each attacks its share.
        labels: [N].
        config: threat and seed.
        processes: share the images.
        single_step: measure FGSM accuracy too (random start, one step of eps).
    """
    start = time.perf_counter()
    model.eval()
    images, labels = (
        images[processes.rank :: processes.size],
        labels[processes.rank :: processes.size],
    )
    seed = config.seed + processes.rank
    right = [predict(model, images) == labels]
    right.append(
        pgd_correct(model, images, labels, threat=config.threat, steps=VALIDATION_STEPS, seed=seed)
    )
    if single_step:
        eps = config.threat.eps
        right.append(
            pgd_correct(
                model, images, labels, threat=config.threat, steps=1, step_size=eps, seed=seed
            )
        )
    counts = torch.tensor([len(labels), *(int(r.sum()) for r in right)], dtype=torch.float64)
    n, clean, robust, *rest = processes.total(counts).tolist()
    return EpochRecord(
        epoch=0,
        loss=math.nan,
        clean=clean / n,
        robust=robust / n,
        seconds=time.perf_counter() - start,
        single_step=rest[0] / n if rest else math.nan,
    )


def collapse(records: Sequence[EpochRecord], config: TrainingConfig) -> str | None:
    """Tell catastrophic overfitting in the last epoch, in one line, or return None.

    Robustness to PGD breaks down while clean accuracy does not or the training loss falls, or while
    single steps still fail to fool the model. Only epochs at the whole eps count: clean ones, and
    those before it is reached, lose robustness for other reasons.
    Source: Wong et al., "Fast is better than free", ICLR 2020, arXiv 2001.03994, Sec. 5.
    """
    last = records[-1]
    first = config.clean_epochs + config.eps_warmup
    if last.epoch <= first:
        return None
    counted = [r for r in records[:-1] if r.epoch > first or (r.epoch == 0 and first == 0)]
    before = max(counted, key=lambda r: r.robust, default=None)
    if (
        before is not None
        and before.robust >= 0.05
        and last.robust < 0.5 * before.robust
        and (last.clean >= before.clean - 0.02 or last.loss < before.loss)
    ):
        return (
            f"catastrophic overfitting in epoch {last.epoch}: robust {100 * before.robust:.1f} -> "
            f"{100 * last.robust:.1f} % while clean {100 * before.clean:.1f} -> "
            f"{100 * last.clean:.1f} %"
        )
    if last.single_step >= 0.15 and last.robust < 0.4 * last.single_step:
        return (
            f"catastrophic overfitting in epoch {last.epoch}: {100 * last.single_step:.1f} % "
            f"robust to FGSM, {100 * last.robust:.1f} % to PGD-{VALIDATION_STEPS}"
        )
    return None
