"""torch 2.14.1's heap corruption on CPU: narrow strided convolutions in channels_last."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from robust_prune import compress, evaluate, sensitivity
from tests.conftest import tiny_resnet

CHILD = """
import sys, torch
from torch.utils.data import DataLoader, TensorDataset
from robust_prune import compress
from tests.conftest import tiny_resnet

model = tiny_resnet(channels=[8, 16, 24, 32], in_chans={channels})
model = model.to(memory_format=torch.channels_last)
images = torch.rand(96, 32, 32, {channels}).permute(0, 3, 1, 2)  # channels_last strides
loader = DataLoader(TensorDataset(images, torch.arange(96) % 10), batch_size=32)
result = compress(model, loader, prune_ratio=0.6, allocation="uniform", finetune="{method}",
                  epochs=2, batch_size=32, test=(images, torch.arange(96) % 10), evaluation="pgd",
                  n_eval=32)
narrow = result.model.net.layer2[0].downsample[0]
assert narrow.in_channels < 8 and narrow.stride == (2, 2), narrow
junk = [torch.randn(7 * i + 3) for i in range(2000)]  # touch the heap
print("done", len(junk))
"""


ALWAYS = {("2", "pgd-at", 1), ("1", "trades", 3)}
EACH = [
    pytest.param(*case, marks=() if case in ALWAYS else pytest.mark.slow)
    for case in itertools.product(("1", "2"), ("pgd-at", "trades"), (1, 3))
]


@pytest.mark.parametrize(("threads", "method", "channels"), EACH)
def test_pruning_and_fine_tuning_a_narrow_downsample_survives(
    threads: str, method: str, channels: int
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MALLOC_CHECK_": "3"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(channels=channels, method=method)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.startswith("done")


class Watch:
    """Records the layout of everything that strided 1x1 convolutions see."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        for tensor in (inputs[0], module.weight):
            assert tensor.stride() == torch.empty(tensor.shape).stride(), module
        self.seen += 1


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    found = Watch()
    original = nn.Conv2d.forward

    def forward(self: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
        if self.kernel_size == (1, 1) and self.stride == (2, 2) and images.requires_grad:
            found(self, (images,))
        return original(self, images)

    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    return found


@pytest.mark.parametrize("channels", [1, 3])
def test_no_gradient_passes_a_strided_convolution_in_channels_last(
    watch: Watch, channels: int
) -> None:
    model = tiny_resnet(in_chans=channels).to(memory_format=torch.channels_last)
    images = torch.rand(24, 16, 16, channels).permute(0, 3, 1, 2)
    data = (images, torch.arange(24) % 10)
    sensitivity(model, data, n=8)
    sensitivity(model, data, n=8, method="ascent")
    evaluate(model, data, attack="pgd", n=8)
    compress(
        model,
        data,
        finetune="trades",
        epochs=1,
        batch_size=8,
        test=data,
        evaluation="pgd",
        n_eval=8,
    )
    assert watch.seen > 100
