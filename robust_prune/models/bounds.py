"""No network is built that is much larger than the file that asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.nn.modules import module as hooks

from robust_prune.errors import ModelError
from robust_prune.models.content import Content

# a dense network over what pruning has left of it
LARGER, FREE_VALUES = 256, 2**28
MODULES_PER_TENSOR, FREE_MODULES = 16, 2000


@contextlib.contextmanager
def bounded(content: Content) -> Iterator[None]:
    """Stop builders that make more parameters or modules than a file's weights can belong to.

    Counted while modules are put together, before parameters are filled, so that arguments of a
    file (10^9 channels, 10^9 blocks) cost neither memory nor time.

    Raises:
        ModelError: inside, as soon as the limit is passed.
    """
    most_values = max(FREE_VALUES, LARGER * content.values)
    most_modules = FREE_MODULES + MODULES_PER_TENSOR * len(content.tensors)
    counts = {"values": 0, "modules": 0}

    def count_values(module: Any, name: str, parameter: Any) -> None:
        counts["values"] += 0 if parameter is None else parameter.numel()
        if counts["values"] > most_values:
            raise ModelError(
                f"{content.path}: asks for a network of more than {most_values:,} parameters, and "
                f"holds {content.values:,}; check its arguments, or --arch and --model-kwargs"
            )

    def count_modules(module: Any, name: str, submodule: Any) -> None:
        counts["modules"] += 1
        if counts["modules"] > most_modules:
            raise ModelError(
                f"{content.path}: asks for a network of more than {most_modules:,} modules, and "
                f"holds {len(content.tensors):,} tensors; check its arguments, or --arch and "
                "--model-kwargs"
            )

    handles = [
        hooks.register_module_parameter_registration_hook(count_values),
        hooks.register_module_buffer_registration_hook(count_values),
        hooks.register_module_module_registration_hook(count_modules),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
