"""Batch-norm statistics that move as they move on images of another kind."""

from __future__ import annotations

import torch

from robust_prune.repair.anchors import Anchor, anchors_of
from robust_prune.repair.reconstruction import dense_moments, reconstruct_
from tests.conftest import tiny_resnet


def test_by_hand() -> None:
    anchor = Anchor(
        mean=torch.tensor([1.0, 2.0, 3.0]),
        variance=torch.tensor([4.0, 4.0, 9.0]),
        read_mean=torch.tensor([0.0, 1.0, 1.0]),
        read_variance=torch.tensor([1.0, 2.0, 3.0]),
    )
    mean, variance = anchor.moved(
        torch.tensor([0.5, 1.0]), torch.tensor([2.0, 3.0]), torch.tensor([0, 2]), eps=0.0
    )
    torch.testing.assert_close(mean, torch.tensor([1.5, 3.0]))
    torch.testing.assert_close(variance, torch.tensor([8.0, 9.0]))


def test_on_the_training_images_it_is_what_is_measured_there() -> None:
    read_mean, read = torch.rand(5), torch.rand(5) + 0.5
    anchor = Anchor(read_mean, read, read_mean, read)
    mean, variance = anchor.moved(torch.arange(5.0), torch.ones(5), None, eps=1e-5)
    torch.testing.assert_close(mean, torch.arange(5.0))
    torch.testing.assert_close(variance, torch.ones(5), atol=1e-4, rtol=0)


def test_a_model_that_lost_nothing_keeps_its_statistics_on_any_images() -> None:
    """Plain statistics of these images would be far from the model's own."""
    model = tiny_resnet()
    before = {k: v.clone() for k, v in model.state_dict().items() if "running_" in k}
    images = torch.rand(16, 3, 32, 32) * 0.2
    with anchors_of(model) as anchors:
        dense = dense_moments(model, images)
    assert set(anchors) == {
        n for n, m in model.net.named_modules() if isinstance(m, torch.nn.BatchNorm2d)
    }
    reconstruct_(model, dense, {}, images, anchors=anchors)
    for name, value in before.items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-3, rtol=1e-3)
