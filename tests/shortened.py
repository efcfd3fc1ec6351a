"""AutoAttack in fewer steps, for tests of what happens around it: its four attacks all run."""

from __future__ import annotations

import sys

import pyautoattack
import pytest

from robust_prune.adversaries import autoattack

OURS = sys.modules[autoattack.__module__]


class Shortened(pyautoattack.AutoAttack):
    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 20
        self.square.n_queries = 500


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the product and pyautoattack itself take the shorter one until the test ends."""
    monkeypatch.setattr(pyautoattack, "AutoAttack", Shortened)
    monkeypatch.setattr(OURS, "AutoAttack", Shortened)
