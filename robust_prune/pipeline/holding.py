"""The folder of a run, held by the first process for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from robust_prune.distributed import Processes
from robust_prune.pipeline.run_folder import RunFolder


@contextlib.contextmanager
def held_for_all(
    folder: RunFolder | None, processes: Processes, begin: Callable[[RunFolder], None]
) -> Iterator[None]:
    """Hold a run's folder while the run is at work, and begin or take up the run there.

    Called by every process. The first alone touches the folder; what it is refused, all are.

    Args:
        folder: None where the run keeps no state.
        processes: of this run.
        begin: opens the run in the folder, once it is held.

    Raises:
        RunError: another run is at work there, or `begin` refuses the one that is there.
    """
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            if folder is not None:
                stack.enter_context(folder.held())
                begin(folder)

        processes.on_first(hold)
        yield
