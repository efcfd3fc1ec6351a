"""Images with labels: data sets by name or folder, a user's own, and splits."""

from robust_prune.data.augmentation import Augmentation, crop_and_flip, mixed
from robust_prune.data.class_order import check_class_order
from robust_prune.data.datasets import ImageTensors
from robust_prune.data.opening import (
    as_split,
    from_iterable,
    open_data,
    open_for,
    open_pictures,
)
from robust_prune.data.pictures import stand_ins
from robust_prune.data.splits import DataSplits, Split
from robust_prune.data.synthetic import synthetic_images

__all__ = [
    "check_class_order",
    "Augmentation",
    "DataSplits",
    "ImageTensors",
    "Split",
    "as_split",
    "crop_and_flip",
    "from_iterable",
    "mixed",
    "open_data",
    "open_for",
    "open_pictures",
    "stand_ins",
    "synthetic_images",
]
