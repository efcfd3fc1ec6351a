"""Residual blocks whose branch is gone: what is left is the skip and a constant."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.errors import ModelError

CONSTANT = "constant"
# what a block may do last, by its name in a file
TAILS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
    "mish": F.mish,
    "hardswish": F.hardswish,
}


@dataclass(frozen=True)
class EmptyForm:
    """What a block does without its branch: tail(skip(x) + constant).

    Attributes:
        skip: the child of the block that computes the skip; "" where it is the identity.
        tail: the activation behind the sum, one of `TAILS`; "" for none.
        last: whether channels are the last dimension, and not the second.
    """

    skip: str = ""
    tail: str = ""
    last: bool = False

    @property
    def allowed(self) -> bool:
        """Whether a block without branch can have a part of this name."""
        own = self.skip in (CONSTANT, "empty_form") or hasattr(EmptyBlock, self.skip or "-")
        return not own


class EmptyBlock(nn.Module):
    """A residual block without its branch, which gave the same for all images and positions.

    Its skip keeps the name that it had in the block.
    """

    constant: Tensor
    empty_form: EmptyForm

    def __init__(self, form: EmptyForm, constant: Tensor, skip: nn.Module | None = None) -> None:
        """Take over what is left of a block.

        Args:
            form: how it is put together.
            constant: [C], added to every position.
            skip: the child called `form.skip`, where that is not "".
        """
        super().__init__()
        self.empty_form = form
        if skip is not None:
            self.add_module(form.skip, skip)
        self.register_parameter(CONSTANT, nn.Parameter(constant.detach().clone()))

    @classmethod
    def of(cls, block: nn.Module, form: EmptyForm, constant: Tensor) -> EmptyBlock:
        """Return what is left of a block, in its mode, with its own skip."""
        skip = dict(block.named_children()).get(form.skip)
        return cls(form, constant, skip).train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, C, H, W] or [N, ..., C] of such a tensor."""
        form, constant = self.empty_form, self.constant
        base = self.get_submodule(form.skip)(x) if form.skip else x
        return TAILS[form.tail](base + (constant if form.last else constant.view(-1, 1, 1)))


def empty_blocks(net: nn.Module) -> dict[str, EmptyBlock]:
    """Return the blocks without a branch by their names in the network."""
    return {name: m for name, m in net.named_modules() if isinstance(m, EmptyBlock)}


def empty_forms(net: nn.Module) -> dict[str, dict[str, Any]]:
    """Return by block how it is put together, as a file keeps it."""
    return {name: dataclasses.asdict(block.empty_form) for name, block in empty_blocks(net).items()}


def put_in_(net: nn.Module, name: str, block: nn.Module) -> None:
    """Put a module into the place of another."""
    parent, _, leaf = name.rpartition(".")
    net.get_submodule(parent)._modules[leaf] = block


def empty_(net: nn.Module, forms: Mapping[str, EmptyForm]) -> None:
    """Take the branches of blocks away, as a file says; constants are filled with its weights.

    Raises:
        ModelError: the network has no such block, or the block no such skip.
    """
    modules = dict(net.named_modules())
    for name, form in forms.items():
        if any(name.startswith(f"{other}.") for other in forms):
            raise ModelError(f"block {name[:80]!r} lies in another that is to be left empty")
        block = modules.get(name) if name else None
        if block is None:
            raise ModelError(f"the network has no block {name[:80]!r} to leave empty")
        if form.skip and (form.skip not in dict(block.named_children()) or not form.allowed):
            raise ModelError(f"block {name!r} has no part {form.skip[:80]!r} that skips its branch")
        if isinstance(block, EmptyBlock):
            continue
        like = next(block.parameters(), torch.empty(0))
        constant = torch.zeros(1, dtype=like.dtype, device=like.device)
        put_in_(net, name, EmptyBlock.of(block, form, constant))
