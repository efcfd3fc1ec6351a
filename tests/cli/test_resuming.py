"""A run's folder names code of the user's; it never makes it run."""

from __future__ import annotations

from pathlib import Path

import pytest

from robust_prune.cli.resuming import _check_code, fits
from robust_prune.errors import UsageError


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("finetune", "--finetune"),
        ("score", "--score"),
        ("estimator", "--mrs"),
        ("allocation", "--allocation"),
    ],
)
def test_recorded_code_must_be_named_again(name: str, flag: str) -> None:
    recorded = {name: "os:system"}
    for typed in ({}, {name: "os:popen"}, {name: "uniform"}):
        with pytest.raises(UsageError, match=rf"name it again with {flag} os:system"):
            _check_code(recorded, dict(typed), "finetune", Path("run"))
    named = {name: "os:system"}
    _check_code(recorded, named, "finetune", Path("run"))
    assert not named, "what was named again is the run's own, not another value"
    _check_code({name: "l2"}, {}, "finetune", Path("run"))


def test_unpickling_must_be_asked_for_again() -> None:
    with pytest.raises(UsageError, match="say --trust-pickle again"):
        _check_code({"trust_pickle": True}, {}, "finetune", Path("run"))
    _check_code({"trust_pickle": True}, {"trust_pickle": True}, "finetune", Path("run"))


@pytest.mark.parametrize(
    ("value", "hint", "right"),
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        ("1", float, False),
        (None, int | None, True),
        ("a", int | None, False),
        ("a", Path | None, True),
        (["a"], list[str] | None, True),
        ([1], list[str] | None, False),
        ({"a": 1}, str, False),
    ],
)
def test_recorded_values_have_the_types_of_options(
    value: object, hint: object, right: bool
) -> None:
    assert fits(value, hint) is right
