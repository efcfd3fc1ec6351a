"""Attacks, and fixed sets of adversarial images."""

from robust_prune.adversaries.adversarial_images import (
    AdversarialSet,
    adversarial_loss,
    adversarial_set,
    gradients_of,
)
from robust_prune.adversaries.autoattack import autoattack
from robust_prune.adversaries.folding import Folded
from robust_prune.adversaries.losses import Loss, kl_from
from robust_prune.adversaries.pgd import pgd, pgd_correct, pgd_verdicts, survivors
from robust_prune.adversaries.projections import project, random_start, steepest
from robust_prune.adversaries.quick import quick

__all__ = [
    "pgd_correct",
    "pgd_verdicts",
    "AdversarialSet",
    "Folded",
    "Loss",
    "adversarial_loss",
    "adversarial_set",
    "autoattack",
    "gradients_of",
    "kl_from",
    "pgd",
    "project",
    "quick",
    "random_start",
    "steepest",
    "survivors",
]
