"""Methods of adversarial training by name, by import path, or as functions."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from robust_prune.errors import UsageError
from robust_prune.finetune.attack import Method
from robust_prune.finetune.awp import awp
from robust_prune.user_code import importable_folder

AWP = "+awp"
METHODS: dict[str, Callable[..., Tensor]] = {}
SINGLE_STEP: set[str] = set()

T = TypeVar("T", bound=Callable[..., Tensor])


def training_method(name: str, *, single_step: bool = False) -> Callable[[T], T]:
    """Let a function (model, images, labels, attack) -> loss be asked for by a name.

    Args:
        name: what the command line and `finetune=` know it by.
        single_step: it attacks with one step, so training can collapse and is watched for that.
    """

    def register(function: T) -> T:
        METHODS[name] = function
        if single_step:
            SINGLE_STEP.add(name)
        return function

    return register


def resolve_method(method: str | Method) -> tuple[str, Method]:
    """Return (name, function) of a method's name, an import path `package.module:function`, or a
    function itself; `+awp` behind a name or path wraps it with `awp`.

    Raises:
        UsageError: nothing by that name.
    """
    if not isinstance(method, str):
        return getattr(method, "__name__", type(method).__name__), method
    plain = method.removesuffix(AWP)
    function = METHODS[plain] if plain in METHODS else _imported(plain, method)
    return method, awp(function) if method.endswith(AWP) else function


def is_single_step(name: str) -> bool:
    """Return whether the method of this name attacks with one step, and so can collapse."""
    return name.removesuffix(AWP) in SINGLE_STEP


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


def _imported(path: str, asked: str) -> Callable[..., Tensor]:
    module, _, name = path.partition(":")
    if not module or not name or module.startswith("."):
        raise UsageError(
            f"fine-tuning method {asked!r} is not known; use one of {', '.join(METHODS)}, or "
            f"package.module:function, either with {AWP} behind it where wanted"
        )
    try:
        with importable_folder():
            function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UsageError(f"fine-tuning method {asked!r} can't be imported: {error}") from None
    if not callable(function):
        raise UsageError(
            f"fine-tuning method {asked!r} is not a function but of type {type(function).__name__}"
        )
    found: Callable[..., Tensor] = function
    return found
