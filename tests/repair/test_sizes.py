"""What reconstruction keeps of a pass is bounded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robust_prune.repair import Reconstruction, sizes
from robust_prune.repair.sizes import Sizes
from tests.conftest import tiny_resnet


def test_images_are_as_many_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Sizes.of(tiny_resnet(), torch.rand(1, 3, 32, 32))
    assert found.images(100) == 100
    monkeypatch.setattr(sizes, "PASS_BYTES", 4 * 8 * 32 * 32 * 10)
    assert 5 <= found.images(100) <= 10


def test_positions_are_as_many_as_may_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 5, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Conv2d(5, 7, 1),
        nn.Flatten(),
        nn.Linear(28, 2),
    )
    found = Sizes.of(net, torch.rand(1, 3, 8, 8))
    assert set(found.outputs) == {(64, 5), (4, 7), (1, 2)}
    assert found.positions(10, 32) == 32
    # three values of 12 channels and, once, the two logits, for 10 images: 4 bytes each
    monkeypatch.setattr(sizes, "KEPT_BYTES", 4 * 10 * (3 * 12 + 2))
    assert found.positions(10, 32) == 3
    assert found.positions(10_000, 32) == 1

    kept = Reconstruction.of(net, torch.rand(10, 3, 8, 8)).dense.values()
    assert sum(moments.outputs.nbytes for moments in kept) == 4 * 10 * (3 * 12 + 2)


def test_large_models_keep_half_of_what_their_weights_take(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 64, 100))
    found = Sizes.of(net, torch.rand(1, 3, 8, 8))
    monkeypatch.setattr(sizes, "KEPT_BYTES", 1)
    assert found.weights == 4 * sum(p.numel() for p in net.parameters())
    most = found.positions(80, 64)
    assert 1 < most < 64
    assert 4 * 80 * (4 * most + 100) <= found.weights // 2 < 4 * 80 * (4 * (most + 1) + 100)
