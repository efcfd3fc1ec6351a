"""What residual blocks are worth as a whole: the adversarial loss without each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robust_prune.adversaries import AdversarialSet, adversarial_loss
from robust_prune.criteria.curves import FEWEST_IMAGES, MOST_IMAGES
from robust_prune.graph import Block, branch_sum
from robust_prune.modules import (
    EmptyBlock,
    as_memory_allows,
    device_of,
    evaluating,
    network_of,
    put_in_,
    sharing,
    watching,
)
from robust_prune.types import LARGEST_RISE


@torch.no_grad()
def branch_means(model: nn.Module, blocks: Sequence[Block], images: Tensor) -> dict[str, Tensor]:
    """Return by block the mean [C] of what its branch adds, over images and positions.

    That is the constant that stands for a branch best, in squares, once it is gone.

    Args:
        model: with all its blocks; left as it was.
        blocks: that can go whole.
        images: [N, C, H, W] in [0, 1].
    """
    forms = {block.name: block.form for block in blocks}
    modules = {name: network_of(model).get_submodule(name) for name in forms}
    sums: dict[str, Tensor] = {}

    def look(name: str, module: nn.Module, x: Tensor) -> None:
        here = branch_sum(module, forms[name], x)
        sums[name] = sums[name] + here if name in sums else here

    def run(size: int) -> dict[str, Tensor]:
        sums.clear()
        with evaluating(model), watching(modules, before=look):
            for part in torch.split(images.to(device_of(model)), size):
                model(part)
        return {name: total / len(images) for name, total in sums.items()}

    return as_memory_allows(run, len(images), "what branches add")


@torch.no_grad()
def block_rises(
    model: nn.Module, blocks: Sequence[Block], adversarial: AdversarialSet, passes: int
) -> dict[str, float]:
    """Return by block how much the mean adversarial loss rises without its branch, in nats.

    A constant stands for the branch; see `branch_means`.

    Args:
        model: left as it was.
        blocks: that can go whole.
        adversarial: images made at the model as it is; as many as `passes` allow are used.
        passes: images times forward passes, over all blocks.
    """
    n = max(FEWEST_IMAGES, min(MOST_IMAGES, passes // (len(blocks) + 1)))
    used = adversarial.first(n)
    constants = branch_means(model, blocks, used.images)
    twin = sharing(model)
    net = network_of(twin)

    with evaluating(twin):
        base, rises = adversarial_loss(twin, used), {}
        for block in blocks:
            whole = net.get_submodule(block.name)
            put_in_(net, block.name, EmptyBlock.of(whole, block.form, constants[block.name]))
            rise = adversarial_loss(twin, used) - base
            put_in_(net, block.name, whole)
            rises[block.name] = rise if rise < LARGEST_RISE else LARGEST_RISE  # NaN too
    return rises
