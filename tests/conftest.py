"""Small models and data that every test can build in milliseconds."""

from __future__ import annotations

import os
import signal

# workers of pytest-xdist share the cores: two threads each would wait for one another
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")

import hypothesis
import pytest
import torch
from torch import nn

from robust_prune.data import DataSplits, open_data
from robust_prune.models import build_model, resolve_spec
from robust_prune.modules import ImageModel
from robust_prune.types import ModelSpec, ThreatModel

# the same examples on every machine; --hypothesis-profile=default searches for new ones
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

TINY = {
    "layers": [1, 1, 1, 1],
    "channels": [8, 16, 24, 32],
    "stem_type": "deep",
    "stem_width": 4,
}


def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms statistics of their own, so that equality tests mean something."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
    return model


def tiny_resnet(seed: int = 0, **kwargs: object) -> ImageModel:
    """A four-stage ResNet of some 40,000 parameters on 3x32x32 images."""
    torch.manual_seed(seed)
    spec = resolve_spec("resnet18", {"num_classes": 10, **TINY, **kwargs}, cifar_stem=True)
    spec = ModelSpec(**{**spec.__dict__, "input_size": (3, 32, 32)})
    model = build_model(spec)
    randomize_(model, seed)
    return model.eval()


class OwnNet(nn.Module):
    """A user's own class, with a skip, a grouped convolution and a flatten."""

    def __init__(self, width: int = 12, classes: int = 5) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=4)
        self.skip = nn.Conv2d(width, width, 1)
        self.hidden = nn.Linear(width * 16, 20)
        self.out = nn.Linear(20, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(images)))
        x = torch.relu(self.grouped(x)) + self.skip(x)
        x = nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
        return self.out(torch.relu(self.hidden(x)))


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs behind them
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def resnet() -> ImageModel:
    return tiny_resnet()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(0, 10, (16,), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def threat() -> ThreatModel:
    return ThreatModel.linf("8/255")


@pytest.fixture(scope="session")
def digits() -> DataSplits:
    return open_data("digits", input_size=(1, 16, 16))
