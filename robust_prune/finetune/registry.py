"""Methods of adversarial training by name, by import path, or as functions, and their wrapper."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from torch import Tensor, nn

from robust_prune.finetune.attack import Method
from robust_prune.finetune.awp import awp
from robust_prune.registry import METHODS

AWP = "+awp"


def resolve_method(method: str | Method) -> tuple[str, Method]:
    """Return (name, function) of a method's name, an import path `package.module:function`, or a
    function itself; `+awp` behind a name or path wraps it with `awp`.

    Raises:
        UsageError: nothing by that name.
    """
    if not isinstance(method, str):
        return getattr(method, "__name__", type(method).__name__), method
    function = METHODS.find(method.removesuffix(AWP), told=method)
    return method, awp(function) if method.endswith(AWP) else function


def is_single_step(name: str) -> bool:
    """Return whether the method of this name attacks with one step, and so can collapse."""
    return bool(METHODS.fact(name.removesuffix(AWP), "single_step"))


def needs_teacher(method: Callable[..., Tensor]) -> bool:
    """Return whether the method has a parameter named `teacher` that no model is bound to."""
    try:
        parameter = inspect.signature(method).parameters.get("teacher")
    except ValueError:  # some builtins have no signature to read
        return False
    return parameter is not None and not isinstance(parameter.default, nn.Module)


def bind(method: Callable[..., Tensor], teacher: nn.Module) -> Method:
    """Return the method with this model as its `teacher`."""
    return functools.partial(method, teacher=teacher)
