"""Files written whole or not at all, and read without running anything."""

from robust_prune.files.locking import locked
from robust_prune.files.looking import is_folder, is_there
from robust_prune.files.states import read_state, write_state
from robust_prune.files.writing import atomic, write_tensors, write_text

__all__ = [
    "atomic",
    "is_folder",
    "is_there",
    "locked",
    "read_state",
    "write_state",
    "write_tensors",
    "write_text",
]
