"""Models for the Hugging Face Hub: a folder by its conventions, read back and uploaded."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from robust_prune import report
from robust_prune.errors import ModelError, first_line
from robust_prune.files import write_text
from robust_prune.models import (
    CONFIG,
    LIBRARY,
    PREFIX,
    WEIGHTS,
    fetched,
    library_versions,
    save,
    spec_of,
    upload,
)
from robust_prune.opening import load
from robust_prune.types import DATA_NAMES, PUBLIC_DATA, to_plain

CARD, INFO = "README.md", "model_info.json"


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    record: Mapping[str, Any] | None = None,
    *,
    repository: str | None = None,
) -> Path:
    """Write a model as a folder by the Hub's conventions.

    `model.safetensors` is what `save` writes, so that the model can be built again from it;
    `config.json` says what it is; `README.md` is the model card, filled from the report: what was
    pruned, at which cost, and every accuracy with n, interval, attack, eps and seed, dense beside
    pruned. `model_info.json` has RobustBench's fields. Paths of data on this machine are left out.

    Args:
        model: as for `save`.
        folder: made where it is not there; files of these names are replaced, but for a card that
            stands beside the same weights: it may have been edited.
        record: the report of a run (`result.report`), or what a model file recorded.
        repository: `OWNER/NAME` on the Hub, for the card; filled in by `push_to_hub`.

    Returns:
        The folder.

    Raises:
        ModelError: the folder can't be written, or the record is malformed.
    """
    folder, record = Path(folder), _public(record or {})
    plain = {**record, "model": to_plain(spec_of(model)), "versions": library_versions()}
    if report.is_pruned(plain):
        try:
            report.check_record(plain)
        except ValueError as error:
            raise ModelError(f"the report is malformed: {first_line(error)}") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{folder}: can't be made: {error.strerror}") from None
    before = _digest(folder / WEIGHTS)
    save(model, folder / WEIGHTS, record)
    told = ("threat", "status", "plan_digest", "data_name")
    config = {
        "library_name": LIBRARY,
        "model": plain["model"],
        "versions": plain["versions"],
        **{name: record[name] for name in told if name in record},
    }
    write_text(folder / CONFIG, _json(config))
    write_text(folder / INFO, _json(report.model_info(plain)))
    if not (folder / CARD).exists() or before != _digest(folder / WEIGHTS):
        write_text(folder / CARD, report.to_card(plain, repository))
    return folder


def from_pretrained(
    folder_or_repository: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    **options: Any,
) -> nn.Module:
    """Read a model that `save_pretrained` or `push_to_hub` wrote; nothing in it is run.

    Args:
        folder_or_repository: a folder, or `OWNER/NAME` on the Hub.
        revision: branch, tag or commit; the main branch where it is None.
        token: for repositories that are private; None takes that of `hf auth login`.
        cache_dir: where downloads are kept; None takes the Hub's own folder.
        force_download: download what is there already, too.
        local_files_only: take what was downloaded before.
        options: those of `load`, such as `model=MyNet()` and `device`.

    Raises:
        ModelError: there is no such folder or repository, or it is none of this package.
    """
    if Path(folder_or_repository).is_dir():
        return load(folder_or_repository, **options)
    name = str(folder_or_repository).removeprefix(PREFIX)
    folder = fetched(
        f"{name}@{revision}" if revision else name,
        token=token,
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
    )
    if folder is None:
        raise ModelError(
            f"{PREFIX}{name} is not of {LIBRARY}; load('{PREFIX}{name}') asks timm for it"
        )
    return load(folder, **options)


def push_to_hub(
    model: nn.Module,
    repository: str,
    record: Mapping[str, Any] | None = None,
    *,
    commit_message: str = "Upload a model of robust-prune",
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
) -> str:
    """Upload what `save_pretrained` writes, and return the address of the commit.

    Args:
        model: as for `save`.
        repository: `OWNER/NAME`; made where it is not there.
        record: the report of a run (`result.report`), or what a model file recorded.
        commit_message: what the commit says.
        private: whether a new repository is; None takes the owner's default.
        token: that may write there; None takes that of `hf auth login`.
        branch: to commit to; the main branch where it is None.
        create_pr: whether to open a pull request with the commit.

    Raises:
        ModelError: the Hub can't be reached, or does not let this token write there.
    """
    with tempfile.TemporaryDirectory(prefix="robust-prune-") as folder:
        save_pretrained(model, folder, record, repository=repository)
        return upload(
            Path(folder),
            repository,
            commit_message=commit_message,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
        )


def _public(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without the places of data on this machine."""
    data = record.get("data")
    if not isinstance(data, Mapping):
        return dict(record)
    public = {name: value for name, value in data.items() if name != "data_root"}
    for name in ("data", "pictures"):
        text = public.get(name)
        if isinstance(text, str) and text not in DATA_NAMES and not PUBLIC_DATA.fullmatch(text):
            public[name] = Path(public[name]).name
    return {**record, "data": public}


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(2**20):
            found.update(part)
    return found.hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
