"""What a channel, a layer and a group are worth: scores, MRS and curves."""

from robust_prune.criteria.blocks import block_rises, branch_means
from robust_prune.criteria.curves import (
    FEWEST_IMAGES,
    IMAGE_PASSES,
    MOST_IMAGES,
    masked,
    removal_prices,
    structural_curves,
)
from robust_prune.criteria.estimators import structural
from robust_prune.criteria.limited import STAYS, LimitedScores
from robust_prune.criteria.measure import calibration_images, calibration_split, measure_mrs
from robust_prune.criteria.mrs import RHO, ascent, first_order, sensitivities
from robust_prune.criteria.scoring import ChannelImportance, channel_scores

__all__ = [
    "calibration_images",
    "calibration_split",
    "ChannelImportance",
    "FEWEST_IMAGES",
    "IMAGE_PASSES",
    "MOST_IMAGES",
    "LimitedScores",
    "RHO",
    "STAYS",
    "ascent",
    "block_rises",
    "branch_means",
    "channel_scores",
    "first_order",
    "masked",
    "measure_mrs",
    "removal_prices",
    "sensitivities",
    "structural",
    "structural_curves",
]
