"""Methods of adversarial training, one a file."""

from robust_prune.finetune.methods.ard import ard
from robust_prune.finetune.methods.mart import mart
from robust_prune.finetune.methods.n_fgsm import n_fgsm
from robust_prune.finetune.methods.pgd_at import pgd_at
from robust_prune.finetune.methods.rslad import rslad, soft_labels
from robust_prune.finetune.methods.trades import BETA, trades

__all__ = ["BETA", "ard", "mart", "n_fgsm", "pgd_at", "rslad", "soft_labels", "trades"]
