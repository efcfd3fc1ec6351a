"""What blocks without a branch add: what their branches added on average."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from robust_prune.modules import empty_blocks, network_of
from robust_prune.repair.reconstruction import Rows


@torch.no_grad()
def fill_constants_(
    pruned: nn.Module, means: Mapping[str, Tensor], rows: Mapping[str, Rows]
) -> None:
    """Let blocks without a branch add, in place, what their branches added on average.

    Args:
        pruned: with the blocks that `means` names empty.
        means: by block, [C] of the dense model's.
        rows: `kept_rows` of the plan.
    """
    for name, block in empty_blocks(network_of(pruned)).items():
        if name in means:
            mean = means[name]
            kept = mean[rows[name][0].to(mean.device)] if name in rows else mean
            block.constant.copy_(kept.view_as(block.constant))
