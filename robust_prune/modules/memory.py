"""Work on a batch that goes on with fewer images at a time where memory runs out."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from robust_prune.errors import MemoryFullError, out_of_memory

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Told:
    """Who hears of smaller batches, how many images each kind of work takes, and all kinds."""

    tell: Callable[[str], None]
    sizes: dict[str, int] = field(default_factory=dict)
    fit: int | None = None


_TOLD: ContextVar[_Told | None] = ContextVar("halving", default=None)


@contextlib.contextmanager
def telling_of_memory(
    tell: Callable[[str], None], fit: Callable[[], int | None] | None = None
) -> Iterator[list[str]]:
    """Let a function hear of batches that memory makes smaller, once for each kind of work.

    Batches are no larger than what fits; where memory runs out all the same they are halved, and
    those to come are as small right away. The innermost of several hears; outside of all a line is
    logged. Gives the list of what was told.

    Args:
        tell: called with a line.
        fit: gives how many images a pass takes in the memory that is free, None if that is not
            known. Asked once: contexts inside take over what the outer one was told.
    """
    outer, lines = _TOLD.get(), list[str]()
    most = outer.fit if outer else None
    if most is None and fit is not None:
        most = fit()

    def keep(line: str) -> None:
        lines.append(line)
        tell(line)

    token = _TOLD.set(_Told(keep, outer.sizes if outer else {}, most))
    try:
        yield lines
    finally:
        _TOLD.reset(token)


def as_memory_allows(
    work: Callable[[int], T],
    images: int,
    what: str,
    effect: str = "",
    *,
    fewest: int = 1,
    ahead: bool = True,
) -> T:
    """Return what the work on a batch gives, done with as many images at a time as memory takes.

    Args:
        work: called with the most images that it may take at a time; where memory runs out it is
            called anew, with half as many, so that it must not have changed anything by then.
        images: of the batch.
        what: the kind of work, for the line that tells of it; its size is kept for what follows.
        effect: of smaller parts on the result, where there is one.
        fewest: images that the work can take.
        ahead: whether the work takes no more than fit by the outer context's measure.

    Raises:
        MemoryFullError: memory does not even suffice for these.
    """
    told = _TOLD.get() or _Told(logger.warning)
    while True:
        size = max(fewest, min(images, told.sizes.get(what, images)))
        if ahead and told.fit is not None and size > max(fewest, told.fit):
            told.sizes[what] = size = max(fewest, told.fit)
            why = f"the memory that is free takes no {images} images at a time for {what}"
            told.tell(_line(why, size, effect))
        try:
            return work(size)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # the error is gone here, and with it the tensors of the pass that its traceback held
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        if size <= fewest:
            raise MemoryFullError(
                f"memory does not suffice for {what}, not even with {size} image"
                f"{'s' if size > 1 else ''} at a time; take smaller images (--input-size), a "
                "smaller model or another machine"
            )
        told.sizes[what] = size // 2
        why = f"memory does not suffice for {what} of {size} images at a time"
        told.tell(_line(why, size // 2, effect))


def _line(why: str, size: int, effect: str) -> str:
    return f"{why}: {size} are taken from here on{'; ' if effect else ''}{effect}"


def release_memory() -> None:
    """Give the system back what is free in the C library's heap, where it can do so (glibc).

    Freed tensors of some MiB each stay with the process otherwise, and add to what comes next.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
