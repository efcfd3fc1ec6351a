"""Folders as people have them: every picture is read, or it is said which files are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robust_prune.data import open_data
from robust_prune.errors import DataError


def fill(folder: Path, *names: str, suffix: str = ".png", n: int = 2) -> None:
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(folder / name / f"{i}{suffix}")


@pytest.mark.parametrize("suffix", [".pgm", ".PGM", ".JPEG"])
def test_the_suffixes_of_torchvisions_folders_are_read(suffix: str, tmp_path: Path) -> None:
    fill(tmp_path, "train/a", "train/b", "test/a", "test/b", suffix=suffix)
    assert len(open_data(tmp_path).train) == 4


def test_a_folder_called_valid_is_measured_on(tmp_path: Path) -> None:
    fill(tmp_path, "train/a", "train/b", "valid/a", "valid/b")
    splits = open_data(tmp_path)
    assert splits.test is not None
    assert "test images come from valid/" in splits.notes


def test_files_that_are_not_read_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, "train/a", "train/b", "test/a", "test/b")
    assert not any("no pictures" in note for note in open_data(tmp_path).notes)
    fill(tmp_path, "train/b", suffix=".gif", n=3)
    (tmp_path / "train" / "a" / "list").write_text("x")
    (tmp_path / "train" / "a" / ".hidden.gif").write_text("x")
    notes = open_data(tmp_path).notes
    assert "4 files in train/ are no pictures by their names (.gif, without a suffix)" in notes


def test_a_class_of_other_files_alone_says_what_they_are(tmp_path: Path) -> None:
    fill(tmp_path, "train/a", "test/a")
    fill(tmp_path, "train/b", suffix=".gif")
    with pytest.raises(DataError, match=r"train/b: no images in .*, but 2 other files \(.gif\)"):
        open_data(tmp_path)


def test_a_class_whose_test_folder_is_empty_is_told_as_one_without_a_folder(tmp_path: Path) -> None:
    fill(tmp_path, "train/a", "train/b", "train/c", "test/a", "test/b")
    with pytest.warns(UserWarning, match="no images of class 'c'"):
        without = open_data(tmp_path).notes
    (tmp_path / "test" / "c").mkdir()
    with pytest.warns(UserWarning, match="no images of class 'c'"):
        assert open_data(tmp_path).notes == without
