"""What selects the epoch that is kept: clean and robust accuracy on validation images."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robust_prune.adversaries import pgd_correct
from robust_prune.distributed import Processes
from robust_prune.finetune.config import EpochRecord, TrainingConfig
from robust_prune.modules import predict

VALIDATION_STEPS = 10


def validate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: TrainingConfig,
    processes: Processes,
    *,
    single_step: bool,
) -> tuple[EpochRecord, Tensor]:
    """Return clean, PGD-10 and, where asked, FGSM accuracy, and PGD-10's verdicts.

    Epoch, loss and rate are not filled. Verdicts are [N] booleans on the CPU, of all images in
    every process.

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
    share = slice(processes.rank, None, processes.size)
    verdicts = torch.zeros(len(labels))
    images, labels = images[share], labels[share]
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
    verdicts[share] = right[1].float()
    counts = torch.tensor([len(labels), *(int(r.sum()) for r in right)], dtype=torch.float64)
    n, clean, robust, *rest = processes.total(counts).tolist()
    record = EpochRecord(
        epoch=0,
        loss=math.nan,
        clean=clean / n,
        robust=robust / n,
        seconds=time.perf_counter() - start,
        single_step=rest[0] / n if rest else math.nan,
    )
    return record, processes.total(verdicts).cpu() > 0


def no_less_robust(verdicts: Tensor, peak: Tensor) -> bool:
    """Whether an epoch is as robust as an earlier one, as far as these images can tell.

    It is unless the earlier one is right on more of them by more than a standard error of the
    paired difference, sqrt(b + c), where b and c images are those that only one of them is right
    on. Choosing by the greatest accuracy instead would choose by noise among epochs like these.
    Source of the one-standard-error rule: Breiman et al., "Classification and regression trees",
    1984, Sec. 3.4.3; of the standard error: McNemar, Psychometrika 12, 1947.

    Args:
        verdicts: [N] booleans, whether the model is right under attack.
        peak: the same of the most robust epoch before.
    """
    lost, won = int((peak & ~verdicts).sum()), int((verdicts & ~peak).sum())
    return lost - won <= math.sqrt(lost + won)


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
