"""How many images a pass takes in the memory that is free, measured on one image."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from robust_prune.modules.contexts import evaluating, seeded
from robust_prune.modules.layout import device_of
from robust_prune.modules.outputs import tensors_in

logger = logging.getLogger(__name__)
SHARE = 0.5  # of what is free: gradients, kernels' own buffers and images come to the activations
CGROUPS = Path("/sys/fs/cgroup")


def images_in_free_memory(model: nn.Module, image: Tensor) -> int | None:
    """Return how many images a forward and backward pass takes in half of the free memory.

    What the backward pass of one image needs is what the forward pass keeps for it, and twice the
    largest of that for gradients.

    Args:
        model: left as it was, in eval mode or not.
        image: [1, C, H, W].

    Returns:
        At least 1; None where neither the need nor what is free can be told.
    """
    free = free_bytes(device_of(model))
    if free is None:
        return None
    try:
        needed = bytes_of_a_pass(model, image)
    except Exception as error:  # noqa: BLE001 - a user's module may raise anything; others say it
        logger.info("memory of a pass is not known: %s", error)
        return None
    return max(1, int(SHARE * free) // needed)


def bytes_of_a_pass(model: nn.Module, image: Tensor) -> int:
    """Return the bytes that a forward and backward pass of images takes beside the weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = image.detach().to(device_of(model)).clone().requires_grad_(True)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with evaluating(model), seeded(0), torch.enable_grad(), hooks:
        outputs = tensors_in((model(images),))
    largest = max(1, images.nbytes, *kept.values(), *(out.nbytes for out in outputs))
    return sum(kept.values()) + 2 * largest


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device, by the narrowest limit that is known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or sys.platform != "linux":
        return None
    return min(_limits(), default=None)


def _limits() -> Iterator[int]:
    """Yield what the system, the containers and the process itself leave free."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        (kibibytes,) = (x.split()[1] for x in lines if x.startswith("MemAvailable"))
        yield 1024 * int(kibibytes)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                yield from _of_container(controllers, path.lstrip("/"))
    with contextlib.suppress(OSError, ValueError, IndexError):
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        if most != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            yield max(0, most - pages * resource.getpagesize())


def _of_container(controllers: str, path: str) -> Iterator[int]:
    """Yield what a control group and those around it leave free; pages of files are given back."""
    root = CGROUPS / "memory" if controllers else CGROUPS
    most, now = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if controllers
        else ("memory.max", "memory.current")
    )
    files = "total_inactive_file" if controllers else "inactive_file"
    for folder in (root / path, *(root / path).parents):
        if root not in (folder, *folder.parents):
            return
        with contextlib.suppress(OSError, ValueError, IndexError):
            limit, used = (int((folder / name).read_text()) for name in (most, now))
            lines = (folder / "memory.stat").read_text().splitlines()
            spare = sum(int(x.split()[1]) for x in lines if x.split()[0] == files)
            yield max(0, limit - used + spare)
