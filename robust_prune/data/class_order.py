"""Which label is which class: compared with what a model was trained on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from robust_prune.data.splits import DataSplits
from robust_prune.errors import DataError


def check_class_order(splits: DataSplits, recorded: Mapping[str, Any]) -> DataSplits:
    """Compare the order of class folders with that of the data a model was trained on.

    Args:
        splits: of the data that is given.
        recorded: what the model's file says of its data.

    Returns:
        The splits, with a note where the model does not say which class has which label.

    Raises:
        DataError: the same label would mean another class.
    """
    given, known = splits.source.get("class_names"), recorded.get("class_names")
    if given is None or given == known:
        return splits
    if isinstance(known, list) and known:
        pairs = list(itertools.zip_longest(given, known, fillvalue="none"))
        wrong = next(i for i, (mine, theirs) in enumerate(pairs) if mine != theirs)
        mine, theirs = pairs[wrong]
        raise DataError(
            f"{splits.name}: label {wrong} is class {mine!r} here, but {theirs!r} in the data that "
            "the model was trained on; name class folders alike"
        )
    note = (
        "the model does not say which label is which class; taken as the order of class folders: "
        f"{', '.join(f'{i} {name}' for i, name in enumerate(given[:3]))}, ..."
    )
    return replace(splits, notes=(*splits.notes, note))
