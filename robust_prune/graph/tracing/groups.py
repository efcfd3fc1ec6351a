"""Groups of channels as a traced pass gives them: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """Where a group's channels are stored: entry `indices[i]` along `dim` belongs to `units[i]`.

    `role` is `out` or `in` for the weight of a layer that mixes channels (a convolution, a linear
    layer), and `along` for what has a value per channel. `layer` is the module's dotted name.
    """

    tensor: str
    dim: int
    indices: Tensor
    units: Tensor
    role: str
    layer: str


@dataclass(frozen=True)
class Count:
    """A number in the forward of module `owner` that counts channels.

    `where` lists (group, indices, units): which of the `value` channels belong to which unit;
    those that always stay are not listed.
    """

    owner: str
    value: int
    where: tuple[tuple[int, Tensor, Tensor], ...]


Times = tuple[int, tuple[Count, ...]]  # how often, and the sizes in it that are channels


@dataclass(frozen=True)
class Coupling:
    """Groups of units, what they are stored in, and what else depends on how many there are.

    `groups[g]` are the slots of group g, `sizes[g]` its number of units. `gates[g]` are slots of
    rows whose product with other channels is what the group contributes (queries). `scaled` are
    rows that make up for an attention's scale, which follows its head's width. `uses` lists
    for each weight the positions of its calls, and which sizes among them are channels (it mixes
    tokens, for each channel alike); `products` lists the same of the products between activations.
    `whole_heads` says that attentions lose whole heads, not dims of every head.
    `trains` says that a pass in train mode does more than one in eval mode. `outputs` are the
    groups that the network returns. `lengths` says how many entries a dimension, as `tensor:dim`,
    has: what can be tied. `softmaxes` are modules with a softmax over channels.
    """

    groups: tuple[tuple[Slot, ...], ...]
    sizes: tuple[int, ...]
    gates: tuple[tuple[Slot, ...], ...]
    scaled: tuple[tuple[str, tuple[Slot, ...], int], ...]
    counts: tuple[Count, ...]
    uses: Mapping[str, tuple[Times, ...]]
    products: tuple[Times, ...]
    fixed: Mapping[str, str]
    outputs: frozenset[int]
    lengths: Mapping[str, int] = field(default_factory=dict)
    softmaxes: frozenset[str] = frozenset()
    trains: bool = False
    whole_heads: bool = False
