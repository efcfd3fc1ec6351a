"""Adversarial training: the loop, and its methods by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor, nn

from robust_prune.errors import UsageError
from robust_prune.finetune.attack import Attack
from robust_prune.finetune.n_fgsm import n_fgsm
from robust_prune.finetune.pgd_at import pgd_at
from robust_prune.finetune.trades import trades
from robust_prune.imports import importable_folder

Method = Callable[[nn.Module, Tensor, Tensor, Attack], Tensor]

METHODS: dict[str, Method] = {"trades": trades, "pgd-at": pgd_at, "n-fgsm": n_fgsm}


def resolve(method: str | Method) -> tuple[str, Method]:
    """Return (name, function) of a method's name, an import path `package.module:function`, or a
    function itself.

    Raises:
        UsageError: nothing by that name.
    """
    if not isinstance(method, str):
        return getattr(method, "__name__", type(method).__name__), method
    if method in METHODS:
        return method, METHODS[method]
    if ":" not in method:
        raise UsageError(
            f"fine-tuning method {method!r} is not known; use one of {', '.join(METHODS)}, or "
            "package.module:function"
        )
    module, _, function = method.partition(":")
    try:
        with importable_folder():
            return method, getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"fine-tuning method {method!r} can't be imported: {error}") from None
