"""What `robust_prune.graph` lets through of costs; the old place, for one version."""

import warnings

from robust_prune.graph import count_cost

__all__ = ["count_cost"]

warnings.warn(
    "robust_prune.costs is now a part of robust_prune.graph", DeprecationWarning, stacklevel=2
)
