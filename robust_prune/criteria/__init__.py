"""What a channel, a layer and a group are worth: scores, MRS and curves."""

from robust_prune.criteria.curves import IMAGE_PASSES, masked, structural_curves
from robust_prune.criteria.measure import calibration_images, measure_mrs, structural
from robust_prune.criteria.mrs import ESTIMATORS, RHO, Estimator, ascent, first_order, sensitivities
from robust_prune.criteria.scores import SCORES, ChannelImportance, Score, channel_scores

__all__ = [
    "calibration_images",
    "ChannelImportance",
    "IMAGE_PASSES",
    "ESTIMATORS",
    "Estimator",
    "RHO",
    "SCORES",
    "Score",
    "ascent",
    "channel_scores",
    "first_order",
    "masked",
    "measure_mrs",
    "sensitivities",
    "structural",
    "structural_curves",
]
