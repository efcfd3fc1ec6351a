"""What the zoo says of networks."""

from __future__ import annotations

from benchmarks.zoo import passes


def test_engines_that_were_not_tried_are_not_counted() -> None:
    rows = {"a": {"ours": {"pass": True}}, "b": {"ours": {"pass": False}}}
    assert passes("all", rows) == "all: 1 of 2 pass"
    rows["a"]["plain"] = {"pass": False}
    assert passes("all", rows) == "all: 1 of 2 pass; torch-pruning alone: 0"
