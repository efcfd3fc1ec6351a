"""What an attacker may do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from robust_prune.errors import UsageError

Norm = Literal["linf", "l2"]
NORMS: tuple[Norm, ...] = ("linf", "l2")


def parse_eps(text: str | float) -> float:
    """Read a perturbation size: `8/255`, `0.5` or a number."""
    try:
        if isinstance(text, str) and "/" in text:
            numerator, denominator = text.split("/")
            value = float(numerator) / float(denominator)
        else:
            value = float(text)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"eps {text!r} is not a number; write it as 8/255 or 0.031") from None
    if not math.isfinite(value) or value <= 0:
        raise UsageError(f"eps {text!r} must be a positive number, such as 8/255")
    return value


@dataclass(frozen=True)
class ThreatModel:
    """What an attacker may do: move an image in [0, 1] by at most `eps` in `norm`."""

    norm: Norm
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UsageError(f"norm {self.norm!r} is not known; use one of {', '.join(NORMS)}")
        object.__setattr__(self, "eps", parse_eps(self.eps))
        if self.norm == "linf" and self.eps >= 1:
            raise UsageError(
                f"linf eps {self.eps:g} covers the whole range of an image in [0, 1]; "
                "did you mean " + f"{self.eps:g}/255?"
            )

    @classmethod
    def checked(cls, threat: ThreatModel | None) -> ThreatModel:
        """Return what a caller gave, Linf 8/255 for None; UsageError where it is something else."""
        if threat is None:
            return cls.linf("8/255")
        if not isinstance(threat, cls):
            raise UsageError(
                f"threat must be a ThreatModel, as ThreatModel.linf('8/255'), not {threat!r}"
            )
        return threat

    @classmethod
    def linf(cls, eps: str | float) -> ThreatModel:
        """Return the L-infinity ball of radius `eps`, for example `"8/255"`."""
        return cls("linf", parse_eps(eps))

    @classmethod
    def l2(cls, eps: str | float) -> ThreatModel:
        """Return the Euclidean ball of radius `eps`, for example `0.5`."""
        return cls("l2", parse_eps(eps))

    @property
    def eps_text(self) -> str:
        """`eps` as people write it: in 255ths for linf where that is exact enough."""
        steps = self.eps * 255
        if self.norm == "linf" and abs(steps - round(steps)) < 1e-6 and round(steps) >= 1:
            return f"{round(steps)}/255"
        return f"{self.eps:g}"

    def __str__(self) -> str:
        return f"{self.norm} {self.eps_text}"
