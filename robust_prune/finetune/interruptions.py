"""Requests to stop that wait until a batch is finished."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from robust_prune import stopping

STOPS = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, an end of the machine's or queue's, a lost line


@contextlib.contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Let the first request to stop only be noted: give a function that tells whether one came.

    Of the signals that Python itself does not turn into KeyboardInterrupt only those are noted for
    which the program has asked to (as the command line does): others end a process as before.
    """
    asked = threading.Event()
    if stopping.asked():  # and was dropped on its way
        asked.set()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def note(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    numbers = [getattr(signal, name) for name in STOPS if hasattr(signal, name)]
    before = {
        number: signal.signal(number, note)
        for number in numbers
        if number == signal.SIGINT or signal.getsignal(number) is stopping.stop
    }
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
