"""One forward pass that finds out which channels of which tensors can only go together.

Every entry of every tensor carries an atom: the identity of the channel it belongs to, or 0 where
nothing can be removed. Layers give their outputs fresh atoms; adding tensors joins the atoms of
their entries; moving data around (views, concatenation, windows, heads) moves the atoms with it.
What the rules don't know keeps its channels: an operation can cost prunable groups, never
correctness.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robust_prune.graph.tracing.atoms import FIXED, Atoms, compress, zeros
from robust_prune.graph.tracing.products import Place, Product, work_of
from robust_prune.graph.tracing.uses import channel_vectors
from robust_prune.modules import check_transparent, tensors_in


class HasStack(Protocol):
    """What keeps the names of the modules whose forwards are running."""

    stack: list[str]


class UntraceableError(Exception):
    """An operation meets channels in a way that the rules don't know."""


Call = tuple[str, str, tuple[int, ...]]
HEAD_NUMBERS = ("num_heads", "heads", "n_heads", "nhead")


@dataclass(frozen=True)
class Site:
    """An integer that the forward of module `owner` was called with: a number of channels.

    `atoms` [value] are the channels counted.
    """

    owner: str
    value: int
    atoms: Tensor


@dataclass
class Labels:
    """What a trace collects.

    `biases` has, by the atom of a weight's row, that of its bias where this is a part of another.
    """

    atoms: Atoms = field(default_factory=Atoms)
    axes: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    entries: dict[int, Tensor] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    uses: dict[int, list[tuple[int, list[Tensor]]]] = field(default_factory=dict)
    products: list[tuple[int, list[Tensor]]] = field(default_factory=list)
    out_dims: dict[int, int] = field(default_factory=dict)
    scaled: list[tuple[str, Tensor]] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)
    reasons: list[tuple[Tensor, str]] = field(default_factory=list)
    biases: dict[int, int] = field(default_factory=dict)
    softmaxes: set[str] = field(default_factory=set)

    def axis(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the atoms [size] along one dimension of a parameter or buffer."""
        key = id(tensor), dim
        if key not in self.axes:
            self.axes[key] = self.atoms.new(tensor.shape[dim])
        return self.axes[key]

    def fix(self, atoms: Tensor, reason: str) -> None:
        """Make these channels stay."""
        free = atoms[self.atoms.find(atoms.contiguous()) != FIXED]
        if len(free):
            self.reasons.append((free.contiguous(), reason))
            self.atoms.fix(free)


Rule = Callable[["Tracer", str, tuple[Any, ...], dict[str, Any], Any], None]


class Tracer(TorchFunctionMode):
    """Follows the atoms through every torch function that a forward pass calls."""

    def __init__(self, net: nn.Module, rules: dict[str, Rule], whole_heads: bool = False) -> None:
        super().__init__()
        self.whole_heads = whole_heads
        self.labels = Labels()
        self.rules = rules
        self.parameters = {id(p): p for p in net.parameters()}
        self.buffers = {id(b): b for b in net.buffers()}
        self.weighing = self.parameters | channel_vectors(net)
        self.stack: list[str] = []
        self.calls: set[Call] = set()
        self.modules = dict(net.named_modules())

    def follow(self, twin: nn.Module) -> None:
        """Look at the modules of a copy that shares the network's parameters and buffers."""
        self.modules = dict(twin.named_modules())

    @property
    def owner(self) -> str:
        """Name of the module whose forward is running."""
        return self.stack[-1] if self.stack else ""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        self.calls.add(call_of(self.owner, func, args, kwargs, self.parameters))
        out = func(*args, **kwargs)
        outputs = tensors_in((out,))
        weights, products = work_of(name, args, kwargs, out, self.is_parameter)
        for weight, positions in weights:
            self.labels.uses.setdefault(id(weight), []).append((positions, []))
        if name == "setitem":
            self.fix(f"is written to by position in {self.owner}", *args)
        elif outputs:
            rule = self.rules.get(name)
            try:
                if rule is None:
                    raise UntraceableError(name)
                rule(self, name, args, kwargs, out)
            except Exception as error:  # noqa: BLE001 (what a rule can't follow has to stay)
                reason = str(error) if isinstance(error, UntraceableError) else name
                where = f" in {self.owner}" if self.owner else ""
                self.fix(f"meets {reason}{where}", *args, *kwargs.values(), *outputs)
        for product in products:
            self._note(product)
        return out

    def is_parameter(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a parameter of the network."""
        return id(tensor) in self.parameters

    def _note(self, product: Product) -> None:
        """Remember a product, and which of its sizes are channels."""
        shrinking = [self._channels(places) for _, places in product]
        times = math.prod(size for size, _ in product)
        self.labels.products.append((times, [atoms for atoms in shrinking if atoms is not None]))

    def _channels(self, places: Sequence[Place]) -> Tensor | None:
        """Return the atoms along the first of these dimensions that channels lie along."""
        for tensor, dim in places:
            whole = (piece_of(tensor) or (tensor, 0))[0]
            if self.is_parameter(whole) and id(whole) not in self.labels.entries:
                continue
            square = square_of(tensor)
            if square is not None:
                return square if dim >= tensor.ndim - 2 else None
            label = self.label(tensor)
            varies = self.varies(label)
            if dim in varies and len(varies) > 1:
                self.labels.fix(label.reshape(-1), "channels in several dimensions of a product")
            elif dim in varies:
                return self.vector(label, dim, tensor.shape[dim])
        return None

    def label(self, tensor: Tensor) -> Tensor:
        """Return the atoms of a tensor's entries, of size 1 along dimensions that share them."""
        if id(tensor) in self.weighing:
            return self.entries(tensor)
        if square_of(tensor) is not None:
            raise UntraceableError("an outer product of channels")
        piece = piece_of(tensor)
        if piece is not None:
            entries = self.entries(piece[0])
            rows = entries[piece[1] : piece[1] + len(tensor)]
            self.labels.atoms.join(rows, entries[: len(tensor)])
            return rows
        found: Tensor | None = getattr(tensor, "_atoms", None)
        if found is None or id(tensor) in self.buffers:
            return zeros(tensor.ndim)
        return found

    def returned(self, tensor: Tensor) -> Tensor:
        """Return the atoms that lie along an output of the network."""
        square = square_of(tensor)
        return self.label(tensor).reshape(-1) if square is None else square

    def set(self, tensor: Tensor, label: Tensor) -> None:
        """Give a tensor its atoms."""
        if id(tensor) not in self.parameters and id(tensor) not in self.buffers:
            tensor._atoms = label  # type: ignore[attr-defined]

    def canonical(self, label: Tensor) -> Tensor:
        """Return what stands for the atoms of a label, compressed by value."""
        return compress(self.labels.atoms.find(label.contiguous()), by_value=True)

    def varies(self, label: Tensor) -> list[int]:
        """Return the dimensions along which different channels lie."""
        return [dim for dim, size in enumerate(self.canonical(label).shape) if size > 1]

    def vector(self, label: Tensor, dim: int, size: int) -> Tensor:
        """Return the atoms [size] along `dim`; UntraceableError where they differ elsewhere too."""
        dim %= label.ndim
        if any(d != dim for d in self.varies(label)):
            raise UntraceableError("channels in several dimensions")
        for other in range(label.ndim):
            if other != dim:
                label = label.narrow(other, 0, 1)
        return label.reshape(-1).expand(size)

    def fix(self, reason: str, *values: Any) -> None:
        """Make the channels of all tensors among the values stay, and remember why."""
        for tensor in tensors_in(values):
            tensor = (piece_of(tensor) or (tensor, 0))[0]
            if id(tensor) in self.weighing:
                label = self.labels.entries.setdefault(id(tensor), zeros(tensor.ndim))
            else:
                square = square_of(tensor)
                label = self.label(tensor) if square is None else square
            self.labels.fix(label.reshape(-1), reason)

    @property
    def heads(self) -> int:
        """Number of heads of the running module, where heads are units; else 0."""
        found = vars(self.modules[self.owner]) if self.whole_heads else {}
        numbers = [found[name] for name in HEAD_NUMBERS if type(found.get(name)) is int]
        return max(numbers, default=0)

    def keeps(self, factor: float) -> bool:
        """Return whether the running module has this fraction, which stays when it is pruned."""
        return any(
            type(n) is float and n == factor for n in vars(self.modules[self.owner]).values()
        )

    def counts(self, value: int) -> bool:
        """Return whether the running module keeps this number, so that pruning can change it."""
        for name, number in vars(self.modules[self.owner]).items():
            numbers = number if isinstance(number, (tuple, list)) else (number,)
            if not name.startswith("_") and any(type(n) is int and n == value for n in numbers):
                return True
        return False

    def entries(self, parameter: Tensor) -> Tensor:
        """Return one atom for every entry of a parameter that is used outside of layers."""
        key = id(parameter)
        if key not in self.labels.entries:
            if parameter.numel() > 2**22:
                raise UntraceableError("a large parameter outside of a layer")
            self.labels.entries[key] = self.labels.atoms.new(parameter.numel()).view(
                parameter.shape
            )
        return self.labels.entries[key]


def mark_piece(piece: Tensor, parameter: Tensor, start: int) -> None:
    """Remember that a tensor is some rows of a parameter, all pieces of which are equally large."""
    piece._piece = parameter, start  # type: ignore[attr-defined]


def piece_of(tensor: Any) -> tuple[Tensor, int] | None:
    """Return of which parameter a tensor is a piece, and its first row; None if of none."""
    found: tuple[Tensor, int] | None = getattr(tensor, "_piece", None)
    return found


def mark_square(product: Tensor, atoms: Tensor) -> None:
    """Remember that a tensor has the same channels along both of its last dimensions."""
    product._square = atoms  # type: ignore[attr-defined]


def square_of(tensor: Any) -> Tensor | None:
    """Return the channels along both of the last dimensions of a tensor; None if it has not."""
    found: Tensor | None = getattr(tensor, "_square", None)
    return found


def name_of(func: Any) -> str:
    """Return the bare name of a torch function: `add` for torch.add, Tensor.add_ and `+=`."""
    name = str(getattr(func, "__name__", ""))
    if name == "__get__":
        return "get_" + str(getattr(func.__self__, "__name__", ""))
    return name.strip("_")


def call_of(
    owner: str,
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    parameters: Container[int],
) -> Call:
    """Return what tells one call of a function from others: owner, name, parameters by id."""
    given = tuple(id(a) for a in (*args, *kwargs.values()) if id(a) in parameters)
    return owner, name_of(func), given


@contextlib.contextmanager
def following(net: nn.Module, tracer: HasStack) -> Iterator[None]:
    """Keep the tracer's stack of running modules."""
    names = {module: name for name, module in net.named_modules()}
    check_transparent(net)

    def enter(module: nn.Module, inputs: Any) -> None:
        tracer.stack.append(names[module])

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        tracer.stack.pop()

    hooks = [m.register_forward_pre_hook(enter) for m in names]
    hooks += [m.register_forward_hook(leave) for m in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
