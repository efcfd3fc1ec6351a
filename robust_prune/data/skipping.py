"""Pictures that can't be read, left out where the user says so, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from robust_prune.data.datasets import Files, Parts
from robust_prune.errors import DataError

NAMED = 3  # paths in a note


def without_unreadable(parts: Parts) -> tuple[Parts, dict[str, int]]:
    """Return the parts without pictures that can't be decoded, and how many were left out of each.

    Every picture is decoded once. A note names the first few; one that can be decoded is never
    left out.

    Raises:
        DataError: nothing is left to learn from, or of a class.
    """
    train, lost = _readable(parts.train)
    test, lost_tests = _readable(parts.test)
    empty = set(range(parts.classes)) - {label for _, label in _samples(train)}
    if lost and (empty or not len(train)):
        raise DataError(f"{lost[0]}; no picture of its class can be read")
    notes = parts.notes
    for which, errors, kept in (("training", lost, train), ("test", lost_tests, test)):
        if errors:
            more = f" and {len(errors) - NAMED} more" if len(errors) > NAMED else ""
            notes += (
                f"{len(errors)} of {len(errors) + len(kept)} {which} pictures can't be read and "
                f"were left out: {'; '.join(errors[:NAMED])}{more}",
            )
    left_out = {"train": len(lost), "test": len(lost_tests)}
    return replace(parts, train=train, test=test, notes=notes), left_out


def _readable(files: Any) -> tuple[Any, list[str]]:
    """Return the files that can be decoded, and a line for each of the others."""
    if not isinstance(files, Files):
        return files, []
    kept, lost = [], []
    for i, sample in enumerate(files.samples):
        try:
            files[i]
            kept.append(sample)
        except DataError as error:
            lost.append(str(error))
    return Files(kept), lost


def _samples(files: Any) -> Sequence[tuple[Any, int]]:
    return files.samples if isinstance(files, Files) else ()
