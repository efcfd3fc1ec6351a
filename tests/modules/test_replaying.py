"""Passes that leave out what lies in front of a change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.modules import Replay

PLENTY = 1 << 30


class WritesInto(nn.Module):
    """Adds to what its first layer gave, and runs another layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, 5]."""
        x = self.first(x)
        x += 1
        x = self.third(F.relu_(self.twice(self.twice(x))))
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        logits: Tensor = self.last(tokens.mean(1))
        return logits


def resnet() -> nn.Module:
    return timm.create_model("resnet18", num_classes=5, channels=(4, 8, 8, 16))


def densenet() -> nn.Module:
    return timm.create_model("densenet121", num_classes=5, growth_rate=4, block_config=(2, 2, 2, 2))


@pytest.mark.parametrize("make", [WritesInto, resnet, densenet])
@torch.no_grad()
def test_a_pass_behind_a_changed_layer_is_the_whole_one(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    images = torch.rand(3, 3, 32, 32)
    replay = Replay(model, PLENTY)
    replay.look_at(images[:1], len(images))
    assert torch.equal(replay.record(images), model(images))
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for name in layers:
        weight = model.get_submodule(name).weight
        before = weight.clone()
        weight *= 0.5  # type: ignore[misc]
        with replay.before([name]):
            found = model(images)
        assert torch.equal(found, model(images)), name
        weight.copy_(before)  # type: ignore[operator]
    assert not [n for n, m in model.named_modules() if "forward" in vars(m)]


@torch.no_grad()
def test_what_lies_in_front_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = resnet().eval()
    images = torch.rand(2, 3, 32, 32)
    replay = Replay(model, PLENTY)
    replay.look_at(images[:1], len(images))
    replay.record(images)
    ran: list[int] = []
    conv2d = F.conv2d

    def counting(*args: object, **kwargs: object) -> Tensor:
        ran.append(1)
        return conv2d(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "conv2d", counting)
    counts = []
    for layers in (["fc"], ["layer4.1.conv2", "fc"], ["layer3.0.conv1"], ["conv1"], [""]):
        ran.clear()
        with replay.before(layers):
            model(images)
        counts.append(len(ran))
    assert counts == [0, 1, 10, 21, 21]


@torch.no_grad()
def test_outer_modules_are_kept_first_and_no_more_than_may_be() -> None:
    model = resnet().eval()
    images = torch.rand(2, 3, 32, 32)

    def kept(most: int) -> dict[str, int]:
        """Return bytes by name of what is kept of a pass."""
        replay = Replay(model, most)
        replay.look_at(images[:1], len(images))
        replay.record(images)
        return {n: c.given.nbytes for n, c in replay._calls.items() if c.given is not None}

    all_of_them = kept(PLENTY)
    outer = {name: size for name, size in all_of_them.items() if "." not in name}
    assert len(all_of_them) > len(outer) > 5
    assert kept(sum(outer.values())) == outer
    assert not kept(0)


@torch.no_grad()
def test_a_view_counts_as_all_that_it_holds() -> None:
    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            """Return the first of 256 copies."""
            return x.repeat(1, 256, 1, 1)[:, :3]

    model = nn.Sequential(Part(), nn.Conv2d(3, 4, 3))
    image = torch.rand(1, 3, 8, 8)
    replay = Replay(model, 4 * 3 * 64 * 256)
    replay.look_at(image, 1)
    assert "0" in replay._kept
    replay = Replay(model, 4 * 3 * 64 * 256 - 1)
    replay.look_at(image, 1)
    assert replay._kept == {"1"}


@torch.no_grad()
def test_a_module_that_only_the_changed_pass_runs_again_is_run() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            """Run the stem again where the second layer gives nothing."""
            y: Tensor = self.second(self.stem(x))
            return y if y.abs().max() > 0 else self.stem(2 * x)  # type: ignore[no-any-return]

    model = Again()
    images = torch.rand(2, 3, 4, 4)
    replay = Replay(model, PLENTY)
    replay.look_at(images[:1], 2)
    replay.record(images)
    for parameter in model.second.parameters():
        parameter.zero_()
    with replay.before(["second"]):
        found = model(images)
    assert torch.equal(found, model(images))


@torch.no_grad()
def test_nothing_is_given_again_after_a_pass_is_forgotten() -> None:
    model = resnet().eval()
    images = torch.rand(2, 3, 32, 32)
    replay = Replay(model, PLENTY)
    replay.look_at(images[:1], 2)
    replay.record(images)
    replay.forget()
    with replay.before(["fc"]):
        assert torch.equal(model(images + 0.1), model(images + 0.1))
    assert not torch.equal(model(images), model(images.flip(0)))
