"""Errors a user can cause: one line each, with what, where, the limit and what to do next."""

from __future__ import annotations


class RobustPruneError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is the process's status."""

    exit_code = 1


class UsageError(RobustPruneError):
    """An argument has a value that can't be used."""

    exit_code = 2


class ModelError(RobustPruneError):
    """A model or its file can't be read, built or written."""

    exit_code = 3


class UnsafeFileError(ModelError):
    """Reading the file would run code from it."""


class DataError(RobustPruneError):
    """A data set is missing, malformed or does not fit the model."""

    exit_code = 4


class PlanError(RobustPruneError):
    """A pruning plan does not fit the model it is applied to."""

    exit_code = 5


class BudgetError(PlanError):
    """The budget asked for can't be reached on this model."""


class TrainingError(RobustPruneError):
    """Training can't go on, for example because the loss is not finite."""

    exit_code = 6


class RunError(RobustPruneError):
    """A run can't be gone on with: nothing there, other settings, or files that can't be read."""

    exit_code = 2


class AttackError(RobustPruneError):
    """An attack can't be run on this model."""

    exit_code = 6


class MemoryFullError(RobustPruneError):
    """The machine has not enough memory for the work, however little is done at a time."""


class Interrupted(RobustPruneError):  # noqa: N818 - it is the user's decision, not a fault
    """The user stopped the run; the message says what was kept."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a GPU or a CPU."""
    signs = "can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc"
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(s in str(error) for s in signs))
