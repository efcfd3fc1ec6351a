"""One process at a time in a run's folder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import filelock

from robust_prune.errors import RunError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, also while it is deleted and made again.

    The lock is the system's on `.NAME.lock` beside the folder: it ends with its process, however
    that ends. The file is deleted at the end; one that a kill has left does not count.

    Raises:
        RunError: another process holds the folder, or the file can't be made.
    """
    place = folder.with_name(f".{folder.name}.lock")
    lock = filelock.FileLock(place, timeout=0)
    taken = RunError(f"{folder}: another run is at work there; wait for its end, or name another")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        if not place.exists():  # the holder before has deleted it since it was opened
            lock.release()
            raise taken
    except filelock.Timeout:
        raise taken from None
    except NotImplementedError:
        logger.warning("%s: this file system knows no locks; start one run at a time", folder)
    except OSError as error:
        raise RunError(f"{place.parent}: can't write there: {error.strerror}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            place.unlink()  # before the release: nobody who comes later may find it
        lock.release()
