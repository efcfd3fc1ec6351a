"""Methods of adversarial training by name, by import path, or as functions."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable

from torch import Tensor, nn

from robust_prune.errors import UsageError
from robust_prune.finetune.ard import ard
from robust_prune.finetune.attack import Attack
from robust_prune.finetune.awp import awp
from robust_prune.finetune.mart import mart
from robust_prune.finetune.n_fgsm import n_fgsm
from robust_prune.finetune.pgd_at import pgd_at
from robust_prune.finetune.rslad import rslad
from robust_prune.finetune.trades import trades
from robust_prune.imports import importable_folder

Method = Callable[[nn.Module, Tensor, Tensor, Attack], Tensor]

AWP = "+awp"
METHODS: dict[str, Callable[..., Tensor]] = {
    "trades": trades,
    "pgd-at": pgd_at,
    "n-fgsm": n_fgsm,
    "mart": mart,
    "rslad": rslad,
    "ard": ard,
}
SINGLE_STEP = frozenset({"n-fgsm"})


def resolve(method: str | Method) -> tuple[str, Method]:
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
