"""A file or a name becomes a module on [0, 1] images, and back."""

from robust_prune.models.builders import (
    build_model,
    default_input_size,
    library_versions,
    resolve_spec,
)
from robust_prune.models.loading import image_size_of, load, open_model, save
from robust_prune.models.manifest import write

__all__ = [
    "image_size_of",
    "build_model",
    "default_input_size",
    "load",
    "open_model",
    "resolve_spec",
    "save",
    "library_versions",
    "write",
]
