"""Readers of files return a value or raise a RobustPruneError, whatever bytes they are given."""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path

import pytest

from robust_prune.errors import RobustPruneError
from tests.fuzz.changing import changed
from tests.fuzz.readers import READERS, Folder, valid, watched

INPUTS = int(os.environ.get("FUZZ_INPUTS", "40"))  # for each reader


@pytest.fixture(scope="module")
def files() -> dict[str, list[bytes]]:
    return valid()


@pytest.mark.parametrize("name", list(READERS))
def test_what_is_changed_is_the_valid_files(name: str, files: dict[str, list[bytes]]) -> None:
    READERS[name](files[name][0], Folder())


def refusal(name: str, data: bytes, folder: Folder) -> str:
    """What is said of a file that is refused; AssertionError with the file for all else."""
    try:
        with watched():
            READERS[name](data, folder)
    except RobustPruneError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{name}: {data!r}") from error
    return ""


@pytest.mark.parametrize("name", list(READERS))
def test_changed_bytes_are_read_or_refused(name: str, files: dict[str, list[bytes]]) -> None:
    generator, folder = random.Random(name), Folder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(INPUTS):
            said = refusal(name, changed(generator.choice(files[name]), generator), folder)
            assert len(said) < 1200
            assert "\n" not in said


def test_running_something_or_writing_is_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"os\.system"), watched():
        os.system("true")
    with pytest.raises(AssertionError, match="open"), watched():
        (tmp_path / "x").write_text("")
