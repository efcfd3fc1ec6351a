"""What a file is, by its first bytes and its table of contents, before anything reads it."""

from __future__ import annotations

import reprlib
import zipfile
from pathlib import Path

from robust_prune.errors import ModelError, first_line


def is_archive(path: Path) -> bool:
    """Whether a file is a zip archive, as those of torch.save are."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # one of several disks
        return True


def foreign(path: Path) -> str:
    """Say of a file that no reader of ours takes it."""
    with path.open("rb") as stream:
        begun = stream.read(4) == b"PK\x03\x04"
    if begun:
        return f"{path}: a PyTorch file (a zip archive) that is cut short: was all of it copied?"
    return f"{path}: not a PyTorch or safetensors file{text_of(path)}"


def text_of(path: Path) -> str:
    """Say how a file begins that is text: a pointer of Git LFS, or a page in place of the file."""
    with path.open("rb") as stream:
        line = stream.read(60).decode(errors="replace").strip().partition("\n")[0].rstrip("\r")
    if len(line) < 8 or not line.isprintable() or "\ufffd" in line:
        return ""
    return f"; it is text that begins {line!r}: was the file itself fetched?"


def _is_tar(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(262)[257:] == b"ustar"


def check_archive(path: Path) -> None:
    """Refuse programs (TorchScript, torch.export), others' archives, and what unpacks to more."""
    if _is_tar(path):
        raise ModelError(f"{path}: a tar archive; unpack it, and name the file in it")
    if not is_archive(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ModelError(f"{path}: a broken archive: {first_line(error)}") from None
    names = {entry.filename.partition("/")[2] for entry in entries}
    if "constants.pkl" in names:
        raise ModelError(
            f"{path}: a TorchScript archive: a compiled program, whose layers can't be pruned; "
            "save the state_dict() of the module that it was made from"
        )
    if "archive_format" in names or any(name.startswith("models/") for name in names):
        raise ModelError(
            f"{path}: a program of torch.export, whose layers can't be pruned; save the "
            "state_dict() of the module that it was made from"
        )
    if entries and not any(name.endswith("data.pkl") for name in names):
        raise ModelError(
            f"{path}: a zip archive that torch.save did not write (it holds "
            f"{reprlib.repr(entries[0].filename)}); unpack it, or save a state_dict()"
        )
    size = path.stat().st_size
    if (unpacked := sum(entry.file_size for entry in entries)) > 2 * size + 2**20:
        raise ModelError(
            f"{path}: an archive of {size:,} bytes that would unpack to {unpacked:,}; torch.save "
            "does not compress"
        )


def looks_like_safetensors(path: Path) -> bool:
    """Eight bytes of header length, then JSON; the suffix decides where that is not clear."""
    with path.open("rb") as stream:
        start = stream.read(9)
    return start[8:9] == b"{" or path.suffix == ".safetensors"


def looks_pickled(path: Path) -> bool:
    """Whether a file begins as a pickle does."""
    with path.open("rb") as stream:
        return stream.read(1) == b"\x80"
