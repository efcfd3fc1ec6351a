"""Requests to stop that can't get lost: noted, beside the KeyboardInterrupt that they raise.

An interrupt that comes while C code asks an object whether it has an attribute is dropped there
without a word. What was noted is looked at again between the stations of a run.
"""

from __future__ import annotations

import threading

_noted = threading.Event()


def stop(*_: object) -> None:
    """Note the request and raise KeyboardInterrupt; a signal handler."""
    _noted.set()
    raise KeyboardInterrupt


def asked() -> bool:
    """Return whether a request came since the program began."""
    return _noted.is_set()


def check() -> None:
    """Raise the KeyboardInterrupt of a request that came, if nothing ended for it."""
    if _noted.is_set():
        raise KeyboardInterrupt


def forget() -> None:
    """Begin anew."""
    _noted.clear()
