"""Copies of modules, whatever state they carry."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robust_prune.errors import ModelError

M = TypeVar("M", bound=nn.Module)


def copied(model: M, shared: dict[int, Any] | None = None) -> M:
    """Return a deep copy of a module.

    Activations that a module keeps (in an attribute, a list, a weight that is computed before each
    call) are copied without the graph that made them, which `copy.deepcopy` refuses to copy.

    Args:
        model: left as it was.
        shared: by id, what the copy is to share with the model, as `copy.deepcopy` takes it.

    Raises:
        ModelError: the module holds something that can't be copied, such as a lock or an open file.
    """
    try:
        with _WithoutGraph():
            return copy.deepcopy(model, shared)
    except Exception as error:  # the user's classes copy themselves
        line = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(
            f"the {type(model).__name__} can't be copied, and only a copy is pruned: "
            f"{type(error).__name__}: {line}; take out of the module what is no weight or setting"
        ) from error


class _WithoutGraph(TorchFunctionMode):
    """Lets tensors be copied that are no leaves of an autograd graph."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))
