"""Rules of allocation, one a file."""

from robust_prune.allocation.rules.capacity import capacity
from robust_prune.allocation.rules.curve import curve
from robust_prune.allocation.rules.inverted import inverted
from robust_prune.allocation.rules.mrs import mrs
from robust_prune.allocation.rules.uniform import uniform

__all__ = ["capacity", "curve", "inverted", "mrs", "uniform"]
