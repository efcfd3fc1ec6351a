"""Estimators of MRS, one a file."""

from robust_prune.criteria.estimators.ascent import ascent_mrs
from robust_prune.criteria.estimators.first_order import first_order_mrs
from robust_prune.criteria.estimators.structural import structural, structural_mrs

__all__ = ["ascent_mrs", "first_order_mrs", "structural", "structural_mrs"]
