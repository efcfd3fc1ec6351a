"""Milliseconds on this device: of layers, kept by shape, and of models by turns."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robust_prune.files import write_text
from robust_prune.graph import Block, ModelGraph
from robust_prune.latency.model import BlockTime, Conditions, LatencyModel, Layer, Table
from robust_prune.modules import EmptyBlock, copied, device_of, evaluating, network_of, watching
from robust_prune.options import LatencyOptions
from robust_prune.untrusted import read_json

if TYPE_CHECKING:
    from torch.utils.benchmark import Timer

SHARES = (0.1, 0.4, 0.7, 1.0)  # of a layer's channels that are timed
BLOCK_MS, BLOCKS = 2.0, 5  # how long a block of calls takes, and how many there are of a layer
PAIRS = 15  # of blocks of two models, by turns
PAIR_MS = 30.0
SCHEMA = "robust-prune/latency/1"


def conditions_of(options: LatencyOptions, device: torch.device) -> Conditions:
    """Return what times are measured with, by what was asked and what is here."""
    if device.type == "cuda":
        return Conditions(
            options.latency_batch, 0, options.latency_precision, torch.cuda.get_device_name(device)
        )
    threads = options.latency_threads or torch.get_num_threads()
    return Conditions(options.latency_batch, threads, options.latency_precision, _processor())


def latency_model(
    graph: ModelGraph, conditions: Conditions, blocks: Sequence[Block] = ()
) -> LatencyModel:
    """Time the layers of a model at a few widths each, blocks that may go, and the whole model.

    What was timed on this device before is taken from `cache_path`.

    Args:
        graph: of the model; left as it was.
        conditions: batch, threads and number format.
        blocks: of the graph, that may go whole.
    """
    model, cache = graph.model, _Cache(cache_path(conditions))
    images = torch.rand(conditions.batch, *graph.input_size, device=device_of(model))
    layers = layers_of(graph, images)
    with _timing(conditions):
        tables = tuple((layer, _table(layer, conditions, images.device, cache)) for layer in layers)
        whole = _block_times(model, blocks, images, conditions)
        dense = statistics.median(
            _blocks(_call(model, images, conditions), conditions, PAIR_MS, PAIRS)
        )
    cache.save()
    return LatencyModel(conditions, dense, tables, graph.groups, whole)


def alternating(
    models: Sequence[nn.Module], images: Tensor, conditions: Conditions, pairs: int = PAIRS
) -> list[float]:
    """Return the milliseconds of models on the same images, timed by turns.

    The median of many short blocks; with one thread they are counted in seconds of the CPU, which
    are those of the clock on a machine that does nothing else, and which other work disturbs less.

    Args:
        models: take images [N, C, H, W]; left as they were.
        images: a batch.
        conditions: threads and number format.
        pairs: how often every model has its turn.
    """
    with _timing(conditions), contextlib.ExitStack() as modes:
        for model in models:
            modes.enter_context(evaluating(model))
        calls = [_call(model, images, conditions) for model in models]
        timers = [_timer(call, conditions) for call in calls]
        numbers = [_number(timer, PAIR_MS) for timer in timers]
        times: list[list[float]] = [[] for _ in models]
        for _ in range(pairs):
            for timer, number, mine in zip(timers, numbers, times, strict=True):
                mine.append(1000 * timer.timeit(number).mean)
    return [statistics.median(mine) for mine in times]


def cache_path(conditions: Conditions) -> Path:
    """Return the file that keeps the times of layers on a device."""
    where = f"{conditions.device} {conditions.threads} {conditions.precision} {torch.__version__}"
    digest = hashlib.sha256(where.encode()).hexdigest()[:12]
    return Path.home() / ".cache" / "robust-prune" / "latency" / f"{digest}.json"


class _Cache:
    """Times by shape, in a file that may be missing or broken: it is then measured anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.new = False
        try:
            found = read_json(path)
        except (OSError, ValueError):
            found = {}
        times = found.get("ms") if isinstance(found, dict) else None
        self.times: dict[str, float] = {
            str(name): float(ms)
            for name, ms in (times.items() if isinstance(times, dict) else ())
            if isinstance(ms, (int, float)) and math.isfinite(ms) and ms > 0
        }

    def of(self, shape: str, measure: Callable[[], float]) -> float:
        """Return the time of a shape, measured where it is not known."""
        if shape not in self.times:
            self.times[shape], self.new = measure(), True
        return self.times[shape]

    def save(self) -> None:
        """Write the file, where something is new and the folder can be made."""
        if self.new:
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.path, json.dumps({"schema": SCHEMA, "ms": self.times}) + "\n")


def layers_of(graph: ModelGraph, images: Tensor) -> list[Layer]:
    """Return the layers that images meet, with the shapes they read."""
    net = network_of(graph.model)
    shares: dict[str, list[tuple[int, str, int]]] = {}
    for group in graph.groups:
        for slot in graph.slots(group.name):
            each = len(slot.indices) // group.units
            shares.setdefault(slot.tensor, []).append((slot.dim, group.name, each))
    met: dict[str, list[tuple[int, ...]]] = {}
    timed = {n: m for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}

    def note(name: str, layer: nn.Module, x: Tensor) -> None:
        met.setdefault(name, []).append(tuple(x.shape))

    with torch.no_grad(), evaluating(graph.model), watching(timed, before=note):
        graph.model(images)
    return [
        _layer(name, net.get_submodule(name), shapes, shares.get(f"{name}.weight", ()))
        for name, shapes in met.items()
    ]


def _layer(
    name: str,
    module: nn.Module,
    shapes: Sequence[tuple[int, ...]],
    shares: Sequence[tuple[int, str, int]],
) -> Layer:
    weight: Any = module.weight
    sizes = int(weight.shape[0]), int(weight.shape[1])
    settings: tuple[Any, ...] = ("linear", module.bias is not None)
    if isinstance(module, nn.Conv2d):
        settings = (
            *("conv", module.bias is not None, module.kernel_size, module.stride),
            *(module.padding, module.dilation, module.groups),
        )
    sides = tuple((dim, group, each) for dim, group, each in shares if dim < 2)
    return Layer(name, sizes, sides, shapes[0], settings, len(shapes))


def _block_times(
    model: nn.Module, blocks: Sequence[Block], images: Tensor, conditions: Conditions
) -> tuple[BlockTime, ...]:
    """Time residual blocks, on what they read, by turns with what is left of them."""
    net = network_of(model)
    modules = {block.name: net.get_submodule(block.name) for block in blocks}
    read: dict[str, Tensor] = {}
    with evaluating(model), watching(modules, before=lambda name, _, x: read.update({name: x})):
        model(images)
    found = []
    for block in blocks:
        module, x = modules[block.name], read[block.name]
        constant = x.new_zeros(block.cost.constant.shape)
        with evaluating(model):
            whole, left = alternating(
                [module, EmptyBlock.of(module, block.form, constant)], x, conditions, BLOCKS
            )
        kept = f"{block.name}.{block.form.skip}." if block.form.skip else "?"
        inside = tuple(
            f"{block.name}.{name}"
            for name, layer in module.named_modules()
            if isinstance(layer, (nn.Conv2d, nn.Linear))
            and not f"{block.name}.{name}.".startswith(kept)
        )
        found.append(BlockTime(block.name, block.groups, inside, max(whole - left, 0.0)))
    return tuple(found)


def _table(layer: Layer, conditions: Conditions, device: torch.device, cache: _Cache) -> Table:
    shrinking = {side for side, _, _ in layer.shares}
    grid = [
        sorted({max(1, round(s * size)) for s in (SHARES if side in shrinking else (1.0,))})
        for side, size in enumerate(layer.sizes)
    ]
    ms = tuple(
        tuple(
            cache.of(
                f"{layer.settings} {layer.inputs} {outputs} {inputs}",
                lambda o=outputs, i=inputs: _time(layer, o, i, conditions, device),  # type: ignore[misc]
            )
            for inputs in grid[1]
        )
        for outputs in grid[0]
    )
    return Table(tuple(grid[0]), tuple(grid[1]), ms)


def _time(
    layer: Layer, outputs: int, inputs: int, conditions: Conditions, device: torch.device
) -> float:
    """Return the milliseconds of a layer of these sizes, with random weights."""
    module, shape = layer_module(layer, outputs, inputs)
    module = module.to(device).eval()
    call = _call(module, torch.rand(shape, device=device), conditions)
    return statistics.median(_blocks(call, conditions, BLOCK_MS, BLOCKS))


def layer_module(layer: Layer, outputs: int, inputs: int) -> tuple[nn.Module, list[int]]:
    """Return a layer of these sizes with random weights, and the shape that it reads."""
    kind, bias, *rest = layer.settings
    shape = list(layer.inputs)
    module: nn.Module
    if kind == "linear":
        shape[-1], module = inputs, nn.Linear(inputs, outputs, bias)
    else:
        kernel, stride, padding, dilation, groups = rest
        if layer.sizes[1] == 1 and groups > 1:  # depthwise: as many groups as inputs
            groups = max(1, groups * outputs // layer.sizes[0])
        outputs = math.ceil(outputs / groups) * groups
        shape[1] = inputs * groups
        module = nn.Conv2d(
            *(inputs * groups, outputs, kernel, stride, padding, dilation, groups, bias)
        )
    return module, shape


def _call(model: nn.Module, images: Tensor, conditions: Conditions) -> Callable[[], Tensor]:
    images = images.to(device_of(model)) if next(model.parameters(), None) is not None else images
    if conditions.precision == "bfloat16":
        model = copied(model).bfloat16()
        images = images.bfloat16()
    return lambda: model(images)


def _timer(call: Callable[[], Tensor], conditions: Conditions) -> Timer:
    timer = _timer_class()
    more: dict[str, Any] = {"timer": time.thread_time} if conditions.threads == 1 else {}
    return timer("call()", globals={"call": call}, num_threads=max(conditions.threads, 1), **more)


@functools.cache
def _timer_class() -> type[Timer]:
    """Import torch's timer when something is timed: it says on stderr that there is no CUDA."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torch.utils.benchmark import Timer
    finally:
        logger.setLevel(level)
    return Timer


def _number(timer: Timer, block_ms: float) -> int:
    """Return how many calls make a block."""
    once = min(timer.timeit(1).mean for _ in range(2))
    return max(1, min(1000, round(block_ms / 1000 / max(once, 1e-7))))


def _blocks(
    call: Callable[[], Tensor], conditions: Conditions, block_ms: float, blocks: int
) -> list[float]:
    timer = _timer(call, conditions)
    number = _number(timer, block_ms)
    return [1000 * timer.timeit(number).mean for _ in range(blocks)]


@contextlib.contextmanager
def _timing(conditions: Conditions) -> Iterator[None]:
    """Without gradients, and with the random state and the threads of before afterwards."""
    threads = torch.get_num_threads()
    try:
        with torch.inference_mode(), torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(itertools.chain(names, [platform.machine()]))
