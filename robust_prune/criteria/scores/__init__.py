"""Channel scores, one a file."""

from robust_prune.criteria.scores.fisher import fisher
from robust_prune.criteria.scores.l2 import l2
from robust_prune.criteria.scores.reconstruction import reconstruction
from robust_prune.criteria.scores.taylor import taylor

__all__ = ["fisher", "l2", "reconstruction", "taylor"]
