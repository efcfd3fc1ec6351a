"""Adversarial training, one method a file."""

from robust_prune.finetune.attack import Attack, Method
from robust_prune.finetune.awp import awp
from robust_prune.finetune.config import EpochRecord, History, Progress, TrainingConfig
from robust_prune.finetune.gradients import gradients_
from robust_prune.finetune.interruptions import interruptions
from robust_prune.finetune.loop import train_
from robust_prune.finetune.methods import (
    BETA,
    ard,
    mart,
    n_fgsm,
    pgd_at,
    rslad,
    soft_labels,
    trades,
)
from robust_prune.finetune.preparing import (
    attacks_in_bfloat16,
    batches_of,
    check_optimizer,
    layout_of,
    native_bfloat16,
    optimizer_of,
)
from robust_prune.finetune.registry import (
    bind,
    is_single_step,
    needs_teacher,
    resolve_method,
)
from robust_prune.finetune.validation import collapse, no_less_robust

__all__ = [
    "Attack",
    "BETA",
    "EpochRecord",
    "History",
    "Method",
    "Progress",
    "TrainingConfig",
    "ard",
    "attacks_in_bfloat16",
    "native_bfloat16",
    "awp",
    "batches_of",
    "bind",
    "check_optimizer",
    "collapse",
    "gradients_",
    "interruptions",
    "is_single_step",
    "layout_of",
    "mart",
    "n_fgsm",
    "needs_teacher",
    "no_less_robust",
    "optimizer_of",
    "pgd_at",
    "resolve_method",
    "rslad",
    "soft_labels",
    "trades",
    "train_",
]
