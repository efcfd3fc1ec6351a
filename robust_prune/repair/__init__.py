"""What is done to the weights and statistics that are left after pruning."""

from robust_prune.repair.batchnorm import recalibrate_batchnorm_
from robust_prune.repair.constants import fill_constants_
from robust_prune.repair.reconstruction import (
    Fit,
    Reconstruction,
    Repaired,
    Rows,
    dense_moments,
    kept_rows,
    reconstruct_,
)

__all__ = [
    "Fit",
    "Reconstruction",
    "Repaired",
    "Rows",
    "dense_moments",
    "fill_constants_",
    "kept_rows",
    "recalibrate_batchnorm_",
    "reconstruct_",
]
