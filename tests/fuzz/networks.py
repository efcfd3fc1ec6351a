"""Small networks from drawn blocks: each is a short list of names, widths and choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

SIDE, WIDTHS, CHOICES = 8, (4, 6, 8, 12), 2**16
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    """What is built: `choices` is taken apart, one decision after another."""

    kind: str
    width: int
    choices: int


@dataclass(frozen=True)
class Drawn:
    """A network as text: the same one on every machine."""

    blocks: tuple[Block, ...]
    head: Block
    seed: int


class Choices:
    """A number as a row of decisions."""

    def __init__(self, number: int) -> None:
        self.number = number

    def of(self, *options: object) -> object:
        self.number, index = divmod(self.number, len(options))
        return options[index]

    def yes(self) -> bool:
        return bool(self.of(False, True))


def divisor(width: int, *others: int) -> int:
    """The largest number of groups below all of these widths, of which each has one at least."""
    found = math.gcd(width, *others)
    return next(n for n in (4, 3, 2, 1) if found % n == 0)


class Part(nn.Module):
    """A block [N, inputs, 8, 8] -> [N, out, 8, 8]."""

    def __init__(self, inputs: int, width: int, choices: Choices) -> None:
        super().__init__()
        self.inputs, self.out = inputs, width
        self.build(choices)

    def build(self, choices: Choices) -> None:
        raise NotImplementedError

    def conv(self, inputs: int, outputs: int, choices: Choices, norm: bool = True) -> nn.Module:
        kernel = 3 if choices.yes() else 1
        groups = divisor(inputs, outputs) if choices.of(0, 0, 0, 1) else 1
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)
        ]
        if norm:
            layers += [normed(outputs, choices), choices.of(nn.ReLU(), nn.GELU(), nn.SiLU())]
        return nn.Sequential(*layers)


def normed(width: int, choices: Choices) -> nn.Module:
    groups = divisor(width)
    layers = (nn.BatchNorm2d(width), nn.GroupNorm(groups, width), Channels(width), nn.Identity())
    return choices.of(*layers)


class Channels(nn.Module):
    """Layer norm over channels, as ConvNeXt has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Plain(Part):
    def build(self, choices: Choices) -> None:
        self.body = self.conv(self.inputs, self.out, choices)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Residual(Part):
    def build(self, choices: Choices) -> None:
        same = self.inputs == self.out and choices.yes()
        self.skip = nn.Identity() if same else nn.Conv2d(self.inputs, self.out, 1)
        middle = choices.of(4, 8)
        self.first = self.conv(self.inputs, middle, choices)
        self.second = self.conv(middle, self.out, choices, norm=choices.yes())
        self.scale = nn.Parameter(torch.rand(self.out, 1, 1)) if choices.yes() else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return self.skip(x) + (y if self.scale is None else y * self.scale)


class Depthwise(Part):
    def build(self, choices: Choices) -> None:
        wide, times = choices.of(4, 8), choices.of(1, 2)
        self.expand = self.conv(self.inputs, wide, choices)
        self.depth = nn.Conv2d(wide, wide * times, 3, padding=1, groups=wide)
        self.norm = normed(wide * times, choices)
        self.project = nn.Conv2d(wide * times, self.out, 1, bias=choices.yes())

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.relu6(self.norm(self.depth(self.expand(x)))))


class Gate(Part):
    def build(self, choices: Choices) -> None:
        self.body = self.conv(self.inputs, self.out, choices)
        make = choices.of(nn.Linear, lambda a, b: nn.Conv2d(a, b, 1))
        self.down, self.up, self.flat = make(self.out, 4), make(4, self.out), make is nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        pooled = x.mean((2, 3)) if self.flat else F.adaptive_avg_pool2d(x, 1)
        gate = torch.sigmoid(self.up(F.relu(self.down(pooled))))
        return x * (gate[:, :, None, None] if self.flat else gate)


class Concatenation(Part):
    def build(self, choices: Choices) -> None:
        self.keeps, self.shuffles = choices.yes(), choices.yes()
        self.branches = nn.ModuleList(
            self.conv(self.inputs, self.out, choices) for _ in range(choices.of(1, 2))
        )
        self.out = self.out * len(self.branches) + self.keeps * self.inputs
        self.norm = normed(self.out, choices)
        self.groups = divisor(self.out)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([*([x] if self.keeps else []), *(f(x) for f in self.branches)], 1)
        y = self.norm(y)
        if self.shuffles:
            n, c, h, w = y.shape
            y = y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        return y


class Chunks(Part):
    def build(self, choices: Choices) -> None:
        self.whole = self.conv(self.inputs, 2 * self.out, choices)
        self.first = self.conv(self.out, self.out, choices)
        self.cut = choices.of("chunk", "split", "slices", "view", "tensor_split")
        self.way = choices.of("glu", "add", "cat", "first", "mul")
        self.out *= 2 if self.way == "cat" else 1

    def halves(self, x: Tensor) -> Sequence[Tensor]:
        half = x.shape[1] // 2
        if self.cut == "view":
            return x.view(len(x), 2, half, *x.shape[2:]).unbind(1)
        return {
            "chunk": lambda: x.chunk(2, 1),
            "split": lambda: torch.split(x, [half, half], dim=1),
            "slices": lambda: (x[:, :half], x[:, half:]),
            "tensor_split": lambda: x.tensor_split(2, dim=1),
        }[self.cut]()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.halves(self.whole(x))
        a = self.first(a)
        return {
            "glu": lambda: a * torch.sigmoid(b),
            "add": lambda: a + b,
            "cat": lambda: torch.cat([b, a], 1),
            "first": lambda: a,
            "mul": lambda: a * b,
        }[self.way]()


class Attention(Part):
    def build(self, choices: Choices) -> None:
        self.heads, self.own = choices.of(1, 2), choices.yes()
        self.enter = nn.Conv2d(self.inputs, self.out, 2, stride=2)
        self.before = nn.LayerNorm(self.out) if choices.yes() else nn.Identity()
        self.fused = choices.yes()
        if self.own:
            self.qkv, self.proj = nn.Linear(self.out, 3 * self.out), nn.Linear(self.out, self.out)
        else:
            self.attention = nn.MultiheadAttention(self.out, self.heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(self.out), nn.Linear(self.out, 8), nn.GELU(), nn.Linear(8, self.out)
        )

    def attend(self, x: Tensor) -> Tensor:
        if not self.own:
            return self.attention(x, x, x, need_weights=not self.fused)[0]
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, t, -1))

    def forward(self, x: Tensor) -> Tensor:
        grid = self.enter(x)
        x = grid.flatten(2).transpose(1, 2)
        x = x + self.attend(self.before(x))
        x = x + self.mlp(x)
        return F.interpolate(x.transpose(1, 2).reshape(len(x), -1, *grid.shape[2:]), scale_factor=2)


class Tied(Part):
    def build(self, choices: Choices) -> None:
        self.enter = self.conv(self.inputs, self.out, choices)
        self.twice = self.conv(self.out, self.out, choices)
        self.other = nn.Conv2d(self.out, self.out, 1)
        self.last = nn.Conv2d(self.out, self.out, 1)
        if choices.yes():
            self.last.weight = self.other.weight
        self.way = choices.of("row", "sum", "skip")

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        if self.way == "row":
            return self.last(F.relu(self.other(self.twice(self.twice(x)))))
        if self.way == "sum":
            return self.other(self.twice(x)) + self.last(x)
        return x + self.last(F.relu(self.other(x + self.twice(x))))


class Dense(Part):
    def build(self, choices: Choices) -> None:
        self.steps = nn.ModuleList(
            self.conv(self.inputs + 4 * i, 4, choices) for i in range(choices.of(2, 3))
        )
        self.exit = self.conv(self.inputs + 4 * len(self.steps), self.out, choices)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = torch.cat([x, step(x)], 1)
        return self.exit(x)


class Mixer(Part):
    def build(self, choices: Choices) -> None:
        self.enter = nn.Conv2d(self.inputs, self.out, 1)
        self.norm = nn.LayerNorm(self.out)
        self.tokens = nn.Sequential(nn.Linear(SIDE * SIDE, 6), nn.ReLU(), nn.Linear(6, SIDE * SIDE))
        self.channels = nn.Linear(self.out, self.out) if choices.yes() else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).flatten(2)
        x = x + self.tokens(x)
        x = self.channels(self.norm(x.transpose(1, 2))).transpose(1, 2)
        return x.unflatten(2, (SIDE, SIDE))


class Upward(Part):
    def build(self, choices: Choices) -> None:
        groups = divisor(self.inputs, self.out) if choices.yes() else 1
        self.shuffle = choices.yes()
        if self.shuffle:
            self.up: nn.Module = nn.Sequential(
                nn.Conv2d(self.inputs, 4 * self.out, 1, groups=groups), nn.PixelShuffle(2)
            )
        else:
            self.up = nn.ConvTranspose2d(self.inputs, self.out, 2, stride=2, groups=groups)
        self.norm = normed(self.out, choices)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.norm(self.up(x))), 2)


def _fold(x: Tensor) -> Tensor:
    return x.view(len(x), 2, -1, *x.shape[2:]).mean(1).repeat(1, 2, 1, 1)


def _gram(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    weights = (flat @ flat.transpose(1, 2)).softmax(-1)
    return (weights @ flat).view(x.shape)


OPERATIONS: tuple[Layer, ...] = (
    lambda x: x.softmax(1),
    lambda x: x * x.amax(1, keepdim=True),
    lambda x: x - x.mean(1, keepdim=True),
    lambda x: x.flip(1),
    lambda x: x.roll(1, 1),
    lambda x: F.normalize(x, dim=1),
    lambda x: x.cumsum(1),
    lambda x: F.pad(x, (0, 0, 0, 0, 0, 0))[:, torch.arange(x.shape[1] - 1, -1, -1)],
    lambda x: torch.einsum("nchw,ndhw->ndhw", x, x),
    lambda x: x.transpose(2, 3).contiguous().view(x.shape),
    lambda x: torch.stack([x, -x], 0).amax(0),
    lambda x: torch.where(x > 0, x, 0.1 * x.exp().clamp(max=1)),
    lambda x: x.repeat_interleave(2, 1)[:, ::2],
    lambda x: F.local_response_norm(x, 3),
    lambda x: x + x[:, :1],
    lambda x: x.reshape(len(x), -1).view_as(x) ** 2,
    lambda x: x + torch.ones_like(x),
    _fold,
    _gram,
)


class Operation(Part):
    """A convolution, then something that a user might do to channels."""

    def build(self, choices: Choices) -> None:
        self.body = self.conv(self.inputs, self.out, choices, norm=choices.yes())
        self.then = choices.of(*OPERATIONS)
        self.after = nn.Conv2d(self.out, self.out, 1, groups=choices.of(1, divisor(self.out)))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.then(self.body(x)))


PARTS = {
    part.__name__: part
    for part in (
        *(Plain, Residual, Depthwise, Gate, Concatenation, Chunks, Attention, Tied, Dense, Mixer),
        *(Upward, Operation),
    )
}


class Head(nn.Module):
    """From [N, C, 8, 8] to logits, or to two of them."""

    def __init__(self, inputs: int, block: Block) -> None:
        super().__init__()
        self.kind, width = block.kind, block.width
        choices = Choices(block.choices)
        self.side = choices.of(1, 2, 4)
        entries = inputs * self.side**2
        self.norm = nn.BatchNorm1d(entries) if choices.yes() else nn.Identity()
        self.hidden = nn.Linear(entries, width)
        self.out = nn.Linear(entries if self.kind == "linear" else width, 3)
        self.second = nn.Linear(inputs, 2) if self.kind == "two" else None
        if self.kind == "convolution":
            self.out = nn.Conv2d(inputs, 3, 1)

    def forward(self, x: Tensor) -> object:
        if self.kind == "convolution":
            return self.out(x).mean((2, 3))
        flat = self.norm(F.adaptive_avg_pool2d(x, self.side).flatten(1))
        if self.kind == "linear":
            return self.out(flat)
        logits = self.out(F.relu(self.hidden(flat)))
        return logits if self.second is None else (logits, self.second(x.mean((2, 3))))


class Network(nn.Module):
    """Blocks in a row; every third also reads what the first gave."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        torch.manual_seed(drawn.seed)
        self.parts, inputs = nn.ModuleList(), 3
        for block in drawn.blocks:
            part = PARTS[block.kind](inputs, block.width, Choices(block.choices))
            self.parts.append(part)
            inputs = part.out
        self.head = Head(inputs, drawn.head)
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.data.uniform_(0.5, 1.5)
            elif name.endswith(("running_mean", "bias")):
                tensor.data.normal_(0, 0.3)

    def forward(self, x: Tensor) -> object:
        for part in self.parts:
            x = part(x)
        return self.head(x)


def blocks(kinds: Sequence[str]) -> st.SearchStrategy[Block]:
    numbers = st.integers(0, CHOICES - 1)
    return st.builds(Block, st.sampled_from(kinds), st.sampled_from(WIDTHS), numbers)


HEADS = ("linear", "hidden", "convolution", "two")
NETWORKS = st.builds(
    Drawn,
    st.lists(blocks(tuple(PARTS)), min_size=1, max_size=4).map(tuple),
    blocks(HEADS),
    st.integers(0, 99),
)
