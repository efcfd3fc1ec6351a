"""The Hugging Face Hub: a repository's files as a folder here, and a folder as a repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from robust_prune.errors import ModelError, first_line
from robust_prune.models.reading import LIBRARY
from robust_prune.untrusted import read_json

PREFIX = "hf-hub:"
CONFIG, WEIGHTS = "config.json", "model.safetensors"

T = TypeVar("T")


def fetched(name: str, **options: Any) -> Path | None:
    """Return a folder with the files of a repository of ours; None where it is another library's.

    Configuration and weights are those of one commit. Nothing is read but JSON, and nothing run.

    Args:
        name: `owner/name`, with `@revision` behind it where that is not the main branch.
        options: `token`, `cache_dir`, `force_download` and `local_files_only`, as
            `huggingface_hub.snapshot_download` takes them.

    Raises:
        ModelError: there is no such repository, the Hub can't be reached, or a file is missing.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    folder = _snapshot(repository, CONFIG, revision=revision or None, **options)
    if not is_ours(folder):
        return None
    # by the commit that the configuration is of
    _snapshot(repository, WEIGHTS, revision=folder.name, **options)
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{PREFIX}{repository}: it has no {WEIGHTS}")
    return folder


def is_ours(folder: Path) -> bool:
    """Return whether a folder's config.json says that this package wrote it."""
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("library_name") == LIBRARY


def upload(
    folder: Path,
    repository: str,
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
) -> str:
    """Make a repository where there is none, upload a folder in one commit, return its address.

    Raises:
        ModelError: the Hub can't be reached, or does not let this token write there.
    """
    hub = huggingface_hub.HfApi(token=token)

    def sent() -> str:
        made = hub.create_repo(repository, private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
        )
        return str(commit)

    return _asked(repository, sent)


def _snapshot(repository: str, file: str, **options: Any) -> Path:
    def asked() -> str:
        return str(huggingface_hub.snapshot_download(repository, allow_patterns=[file], **options))

    return Path(_asked(repository, asked))


def _asked(repository: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except HFValidationError:
        raise ModelError(
            f"{PREFIX}{repository}: not the name of a repository; write {PREFIX}OWNER/NAME"
        ) from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{PREFIX}{repository}: the Hub can't be reached, and no copy is kept here"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{PREFIX}{repository}: the Hub has no such repository, or it is private and there is "
            "no token that may read it"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{PREFIX}{repository}: it has no such revision") from None
    except (OSError, RuntimeError, ValueError) as error:  # the Hub's own are OSErrors
        raise ModelError(f"{PREFIX}{repository}: {first_line(error)}") from None
