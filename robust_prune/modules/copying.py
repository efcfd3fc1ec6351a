"""Copies of modules, whatever state they carry."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robust_prune.errors import ModelError

# what a class may have of its own to say about copies
COPYING = (
    *("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__"),
    *("__getnewargs__", "__getnewargs_ex__", "__new__"),
)
PLAIN = {int, float, bool, str, type(None)}

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
    memo: dict[int, Any] = {} if shared is None else shared
    try:
        with _WithoutGraph():
            return _module(model, memo)
    except Exception as error:  # the user's classes copy themselves
        line = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(
            f"the {type(model).__name__} can't be copied, and only a copy is pruned: "
            f"{type(error).__name__}: {line}; take out of the module what is no weight or setting"
        ) from error


def _module(module: M, memo: dict[int, Any]) -> M:
    """Copy a module as `copy.deepcopy` does, by its attributes, in a third of the time."""
    if id(module) in memo:
        return memo[id(module)]  # type: ignore[no-any-return]
    kind: Any = type(module)
    if _copies_itself(kind):
        return copy.deepcopy(module, memo)
    twin: M = kind.__new__(kind)
    memo[id(module)] = twin
    mine = vars(twin)
    for name, value in vars(module).items():
        mine[name] = value if type(value) in PLAIN else _value(value, memo)
    return twin


@functools.lru_cache(maxsize=256)
def _copies_itself(kind: type) -> bool:
    """Return whether a class of modules has a say in how it is copied."""
    slots = any(vars(each).get("__slots__") for each in kind.__mro__)
    return slots or any(
        getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in COPYING
    )


def _value(value: Any, memo: dict[int, Any]) -> Any:
    """Copy an attribute; most are empty dictionaries, which `copy.deepcopy` takes its time over."""
    kind = type(value)
    if kind in PLAIN:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module):
        return _module(value, memo)
    if kind is dict or (kind is OrderedDict and not vars(value)):
        twin = memo[id(value)] = kind()
        for key, item in value.items():
            key = key if type(key) in PLAIN else _value(key, memo)
            twin[key] = item if type(item) in PLAIN else _value(item, memo)
        return twin
    if kind is set and all(type(item) in PLAIN for item in value):
        return memo.setdefault(id(value), set(value))
    return copy.deepcopy(value, memo)


def sharing(model: M) -> M:
    """Return a copy of a module whose parameters are its own and lie where the model's lie.

    Writing into one of them writes into the model's, so that whoever does puts it back; what
    replaces parameters, as pruning does, leaves the model alone. `own_` ends it.
    """
    parameters: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad)
        for p in model.parameters()
        if type(p) is nn.Parameter
    }
    return copied(model, parameters)


@torch.no_grad()
def own_(copy_: nn.Module, model: nn.Module) -> None:
    """Give a copy a storage of its own for each parameter that lies where one of the model's is."""
    places = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for parameter in copy_.parameters():
        if parameter.untyped_storage().data_ptr() in places:
            parameter.data = parameter.data.clone()


class _WithoutGraph(TorchFunctionMode):
    """Lets tensors be copied that are no leaves of an autograd graph."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))
