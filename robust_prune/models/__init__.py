"""A file or a name becomes a module on [0, 1] images, and back."""

from robust_prune.models.builders import (
    build_model,
    default_input_size,
    library_versions,
    resolve_spec,
)
from robust_prune.models.hub import CONFIG, PREFIX, WEIGHTS, fetched, upload
from robust_prune.models.loading import image_size_of, open_model, save, spec_of
from robust_prune.models.manifest import write
from robust_prune.models.reading import LIBRARY

__all__ = [
    "CONFIG",
    "LIBRARY",
    "PREFIX",
    "WEIGHTS",
    "fetched",
    "upload",
    "image_size_of",
    "build_model",
    "default_input_size",
    "open_model",
    "resolve_spec",
    "save",
    "spec_of",
    "library_versions",
    "write",
]
