"""The loss of masking a group, as a curve over the share that goes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LARGEST_RISE = 1e6  # for a loss that is not finite


@dataclass(frozen=True)
class Curve:
    """Rise of the mean adversarial loss, in nats, when the lowest-scored units of a group go.

    `shares[i]` of the units gone costs `rises[i]`; no units gone costs nothing. `images` says on
    how many it was measured, 0 where that is not known.
    """

    group: str
    shares: tuple[float, ...]
    rises: tuple[float, ...]
    images: int = 0

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Curve:
        """Build it from parsed JSON."""
        shares, rises = tuple(data["shares"]), tuple(data["rises"])
        return cls(data["group"], shares, rises, data.get("images", 0))

    def at(self, share: float) -> float:
        """Return the rise at a share of units in [0, 1], by straight lines between the points.

        The last line goes on beyond the last point.
        """
        points = [(0.0, 0.0), *zip(self.shares, self.rises, strict=True)]
        x, y, slope = 0.0, 0.0, 0.0
        for (x, y), (next_x, next_y) in itertools.pairwise(points):
            slope = (next_y - y) / (next_x - x)
            if share <= next_x:
                break
        return y + slope * (share - x)

    def hull(self) -> Curve:
        """Return the convex curve below this one that never falls, for trading by slopes.

        Noise must not pay for removing channels, so that rises count from the largest before.
        """
        points, highest = [(0.0, 0.0)], 0.0
        for share, rise in zip(self.shares, self.rises, strict=True):
            highest = max(highest, rise)
            while len(points) > 1 and _slope(*points[-2:]) >= _slope(points[-1], (share, highest)):
                points.pop()
            points.append((share, highest))
        shares, rises = zip(*points[1:], strict=True)
        return Curve(self.group, shares, rises, self.images)


def _slope(first: tuple[float, float], second: tuple[float, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])
