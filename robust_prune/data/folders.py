"""Folders of pictures: one for each class in train/ and test/, or of any kind without classes."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from robust_prune.data.datasets import NO_LABEL, Files, Parts
from robust_prune.errors import DataError

# those of torchvision's ImageFolder
IMAGE_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm"),
}
TESTING = ("test", "val", "validation", "valid")


def read_image_folder(path: Path) -> Parts:
    """train/<class>/ and, for testing, the first of `TESTING` with labelled images."""
    folders = {d.name for d in path.iterdir() if d.is_dir()}
    there = [name for name in TESTING if name in folders]
    if "train" not in folders:
        found = ", ".join(sorted(folders)[:5]) or "no folders"
        raise DataError(
            f"{path}: an image folder needs train/<class>/, and test/<class>/ or val/<class>/ to "
            f"measure on; there is {found}; pictures without classes are for --calibration"
        )
    classes = _class_names(path / "train")
    if not classes:
        raise DataError(f"{path / 'train'}: no class folders in it")
    if not there:
        train, kinds = _list_training(path, classes)
        return Parts(
            Files(train),
            (),
            classes=len(classes),
            notes=(
                "there is no test/ or val/ beside train/: nothing is measured on test images",
                *kinds,
                *order_note(classes),
            ),
            class_names=tuple(classes),
        )
    labelled = (name for name in there if _any_image(path / name, classes))
    testing = next(labelled, there[0])
    other = _class_names(path / testing)
    if unknown := sorted(set(other) - set(classes)):
        raise DataError(f"{path / testing}: class {unknown[0]!r} is not in train/")
    notes: tuple[str, ...] = (f"test images come from {testing}/",)
    for name in there[: there.index(testing)]:
        notes += (f"{name}/ has no images in folders called as those of train/",)
    train, kinds = _list_training(path, classes)
    tested, others = _list_files(path / testing, [c for c in classes if c in other], classes)
    seen = {label for _, label in tested}
    if missing := [name for label, name in enumerate(classes) if label not in seen]:
        warnings.warn(f"{path / testing}: no images of class {missing[0]!r}", stacklevel=2)
        notes += (f"{len(missing)} classes have no test images",)
    return Parts(
        Files(train),
        Files(tested),
        classes=len(classes),
        notes=(
            *notes,
            *kinds,
            *_others_note(path / testing, others),
            *order_note(classes),
        ),
        class_names=tuple(classes),
    )


def _list_training(
    path: Path, classes: Sequence[str]
) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    train, others = _list_files(path / "train", classes)
    if empty := sorted(set(range(len(classes))) - {label for _, label in train}):
        folder = path / "train" / classes[empty[0]]
        here = Counter(file.suffix.lower() for file in _visible(folder) if file.is_file())
        raise DataError(
            f"{folder}: no images in this class folder{_but(here)}; add some, or delete it"
        )
    return train, _others_note(path / "train", others)


def read_pictures(path: Path) -> Parts:
    """All pictures below a folder, without labels."""
    if not path.is_dir():
        raise DataError(f"{path}: no such folder of pictures")
    files = [file for file in _in_order(path) if _is_image(file)]
    if not files:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{path}: no pictures in it ({suffixes})")
    return Parts(Files([(file, NO_LABEL) for file in files]), (), classes=0)


def _class_names(folder: Path) -> list[str]:
    """Return class folders in the order of their labels: by number where all are numbers."""
    names = [d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith(".")]
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def order_note(names: Sequence[str]) -> tuple[str, ...]:
    """Return a note where class names hold numbers that the order of labels does not follow."""
    by_number = sorted(
        names, key=lambda n: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", n)]
    )
    if by_number == list(names):
        return ()
    return (
        "labels are in the alphabetical order of class folders, as torchvision has it "
        f"({', '.join(names[:3])} ...), not in that of their numbers ({', '.join(by_number[:3])} "
        "...), as timm has it",
    )


def _any_image(folder: Path, names: Sequence[str]) -> bool:
    return any(_is_image(file) for name in names for file in _visible(folder / name))


def _visible(folder: Path) -> Iterator[Path]:
    """Yield the files below a class folder, but for hidden ones and those in hidden folders."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(root)
        yield from (inside / name for name in files if not name.startswith("."))


def _in_order(folder: Path) -> list[Path]:
    return sorted(_visible(folder), key=lambda file: file.parts)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _but(others: Counter[str]) -> str:
    return f", but {others.total()} other files ({_kinds(others)})" if others else ""


def _others_note(folder: Path, others: Counter[str]) -> tuple[str, ...]:
    """Return a note where a folder's classes hold files that are not read."""
    if not others:
        return ()
    count = others.total()
    return (f"{count} files in {folder.name}/ are no pictures by their names ({_kinds(others)})",)


def _kinds(others: Counter[str]) -> str:
    return ", ".join(kind for kind, _ in others.most_common(3))


def _list_files(
    folder: Path, names: Sequence[str], classes: Sequence[str] | None = None
) -> tuple[list[tuple[Path, int]], Counter[str]]:
    """Return pictures with their labels, and how many other files there are, by suffix."""
    labels = {name: i for i, name in enumerate(classes or names)}
    samples: list[tuple[Path, int]] = []
    others: Counter[str] = Counter()
    for name in names:
        for file in _in_order(folder / name):
            if _is_image(file):
                samples.append((file, labels[name]))
            elif file.is_file():
                others[file.suffix.lower() or "without a suffix"] += 1
    if not samples:
        raise DataError(f"{folder}: no images in its class folders{_but(others)}")
    return samples, others


def read_tiny_imagenet(path: Path) -> Parts:
    """The original layout: train/<wnid>/images, and val/images with val_annotations.txt."""
    wnids = (path / "wnids.txt").read_text(encoding="utf-8").split()
    annotations = path / "val" / "val_annotations.txt"
    if not annotations.exists():
        raise DataError(f"{annotations}: missing; is it the original tiny-imagenet-200 layout?")
    labels = {wnid: i for i, wnid in enumerate(sorted(wnids))}
    test = []
    for line in annotations.read_text(encoding="utf-8").splitlines():
        fields = line.split("\t")
        if len(fields) >= 2 and fields[1] in labels:
            test.append((path / "val" / "images" / fields[0], labels[fields[1]]))
    if not test:
        raise DataError(f"{annotations}: no line names a class of wnids.txt")
    train, _ = _list_files(path / "train", sorted(wnids))
    notes = ("test images are the annotated val/ images; the original test/ has no labels",)
    return Parts(
        Files(train),
        Files(test),
        classes=len(wnids),
        notes=notes,
        class_names=tuple(sorted(wnids)),
    )
