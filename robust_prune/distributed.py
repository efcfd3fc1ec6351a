"""Several processes that train one model: what they must agree on, and who writes.

Accelerate finds the processes that `accelerate launch` or `torchrun` started and speaks their
backend; one process needs nothing of it. The training loop stays plain PyTorch.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from robust_prune import errors
from robust_prune.errors import UsageError

T = TypeVar("T")
PROJECT = "robust-prune"  # what trackers call it
PATIENCE = datetime.timedelta(hours=12)  # the first process plans and measures while others wait


class Processes:
    """One process alone; the base of several. All methods are called by every process.

    Attributes:
        rank: which process this is, from 0.
        size: how many there are.
        device: where this one computes, None where it is free to choose.
    """

    rank = 0
    size = 1
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace float tensors by their means over all processes."""

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        return values

    def copy_first_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by those of the first process."""

    def from_first(self, value: T) -> T:
        """Return the first process's object; it must be picklable."""
        return value

    def gathered(self, values: list[T]) -> list[T]:
        """Return the lists of all processes, one after the other."""
        return values

    def on_first(self, work: Callable[[], T]) -> T:
        """Let the first process do something, and give its result, or its error, to all."""
        value: T | None = None
        mine: Exception | None = None
        if self.first:
            try:
                value = work()
            except Exception as caught:  # noqa: BLE001 - raised again below, by all
                mine = caught
        # text, not the error itself: not every error can be sent
        told = self.from_first(None if mine is None else (type(mine).__name__, str(mine)))
        if mine is not None:
            raise mine
        if told is not None:
            kind = getattr(errors, told[0], errors.RobustPruneError)
            raise kind(told[1])
        return self.from_first(value)  # type: ignore[return-value]

    def share_(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of the first."""
        self.copy_first_([*model.parameters(), *model.buffers()])


ALONE = Processes()


class _Several(Processes):
    def __init__(self, cpu: bool) -> None:
        try:
            import accelerate
            from accelerate import utils
        except ImportError:
            raise UsageError(
                "several processes were started, but accelerate is not installed; "
                "pip install 'robust-prune[distributed]'"
            ) from None
        self._utils = utils
        state = accelerate.PartialState(cpu=cpu, timeout=PATIENCE)
        self.rank, self.size = state.process_index, state.num_processes
        self.device = state.device

    def average_(self, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            return
        # one message for all: many small ones cost more than they carry
        with torch.no_grad():
            wide = any(t.dtype == torch.float64 for t in tensors)
            kind = torch.float64 if wide else torch.float32
            flat = torch.cat([t.detach().reshape(-1).to(kind) for t in tensors])
            flat = self._utils.reduce(flat, reduction="mean")
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def total(self, values: Tensor) -> Tensor:
        summed: Tensor = self._utils.reduce(values.to(self.device), reduction="sum")
        return summed

    def copy_first_(self, tensors: Iterable[Tensor]) -> None:
        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(self._utils.broadcast(tensor.detach().clone().contiguous()))

    def from_first(self, value: T) -> T:
        held = [value]
        self._utils.broadcast_object_list(held)
        return held[0]

    def gathered(self, values: list[T]) -> list[T]:
        found: list[T] = self._utils.gather_object(values)
        return found


_found: Processes | None = None


def processes(*, cpu: bool = False) -> Processes:
    """Return the processes that this one was started among, joining them on the first call.

    Args:
        cpu: compute on the CPU even where there are GPUs.

    Raises:
        UsageError: there are several, and accelerate is missing.
    """
    global _found
    if _found is None:
        _found = _Several(cpu) if started_among() > 1 else ALONE
    return _found


def started_among() -> int:
    """Return how many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave() -> None:
    """Close the connection to the other processes, where there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> list[Any]:
    """Start accelerate's trackers of experiments, and give them what a run was asked.

    Args:
        names: `tensorboard`, `mlflow`, `wandb` or `trackio`.
        folder: where those that write files put them.
        config: arguments of the run.

    Raises:
        UsageError: a package is missing, or a tracker can't be started.
    """
    if not names:
        return []
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError(
            "--track needs the package accelerate: pip install 'robust-prune[distributed]'"
        )
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"--track {name} needs the package {name}: pip install {name}")
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # some of them ask it whether they are in the first process
    more: dict[str, dict[str, Any]] = {
        "tensorboard": {"logging_dir": str(folder)},
        "wandb": {"dir": str(folder)},
    }
    plain = {k: v if isinstance(v, (int, float)) else str(v) for k, v in config.items()}
    started: list[Any] = []
    for name in dict.fromkeys(names):
        try:
            with contextlib.redirect_stdout(sys.stderr):  # where only documents belong
                tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, **more.get(name, {}))
                tracker.start()
                tracker.store_init_configuration(plain)
        except Exception as error:
            for one in started:
                one.finish()
            raise UsageError(
                f"--track {name}: can't be started: {errors.first_line(error)}"
            ) from error
        started.append(tracker)
    return started
