"""Batches are sized by what a pass needs and what is free, before memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import robust_prune as rp
from robust_prune.modules import (
    as_memory_allows,
    free_memory,
    images_in_free_memory,
    telling_of_memory,
)
from robust_prune.modules.free_memory import bytes_of_a_pass, free_bytes
from tests.conftest import OwnNet, randomize_

CPU = torch.device("cpu")
MAPS = 4 * 8 * 16 * 16  # bytes of 8 maps of 16 x 16


def test_a_pass_needs_what_is_kept_for_its_gradient_and_no_weights() -> None:
    wide = nn.Conv2d(3, 8, 3, padding=1)
    net = nn.Sequential(wide, nn.Sigmoid(), nn.Conv2d(8, 8, 3, padding=1), nn.Sigmoid())
    # both sigmoids keep their outputs, the second convolution the first's: the same storage
    needed = 4 * 3 * 16 * 16 + 2 * MAPS + 2 * MAPS
    for count in (1, 5):  # of a larger batch only the image counts
        image = torch.rand(count, 3, 16, 16)[:1]
        assert bytes_of_a_pass(net, image) == needed
    assert all(p.grad is None for p in net.parameters())
    assert not image.requires_grad


def test_as_many_images_fit_as_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    net, image = OwnNet(), torch.rand(1, 3, 16, 16)
    needed = bytes_of_a_pass(net, image)
    for free, fit in ((20 * needed, 10), (3 * needed, 1), (0, 1)):
        monkeypatch.setattr(free_memory, "free_bytes", lambda device, free=free: free)
        assert images_in_free_memory(net, image) == fit
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: None)
    assert images_in_free_memory(net, image) is None
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 10**9)
    assert images_in_free_memory(net, torch.rand(1, 7, 4, 4)) is None  # others say what is wrong


def test_batches_are_no_larger_than_what_fits_and_that_is_told_once() -> None:
    sizes: list[int] = []
    told: list[str] = []

    def work(size: int) -> int:
        sizes.append(size)
        return size

    asked: list[int] = []
    with telling_of_memory(told.append, lambda: asked.append(1) or 20):
        with telling_of_memory(told.append, lambda: asked.append(2) or 5):
            as_memory_allows(work, 64, "attacks", "its draws depend on that")
            as_memory_allows(work, 64, "attacks", "its draws depend on that")
            as_memory_allows(work, 16, "losses")
        as_memory_allows(work, 64, "fits", fewest=32)
    assert asked == [1]
    assert sizes == [20, 20, 16, 32]
    assert told == [
        "the memory that is free takes no 64 images at a time for attacks: 20 are taken from here "
        "on; its draws depend on that",
        "the memory that is free takes no 64 images at a time for fits: 32 are taken from here on",
    ]


def control_group(root: Path, path: str, version: int, limit: str, used: int) -> None:
    folder = (root / "memory" if version == 1 else root) / path
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 7\n{names[2]} 100\n")


@pytest.mark.parametrize(("version", "line"), [(1, "4:memory:/a/b"), (2, "0::/a/b")])
def test_what_is_free_is_the_narrowest_limit_of_all_containers(
    version: int, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 2048 kB\n"}
    files["/proc/self/cgroup"] = f"9:name=systemd:/x\n{line}\n"
    read_text: Callable[[Path], str] = Path.read_text

    def read(path: Path) -> str:
        return files[str(path)] if str(path) in files else read_text(path)

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(free_memory, "CGROUPS", tmp_path)
    assert free_bytes(CPU) == 2048 * 1024
    control_group(tmp_path, "a/b", version, "max", 50_000)
    assert free_bytes(CPU) == 2048 * 1024
    control_group(tmp_path, "a/b", version, "100000", 50_000)
    assert free_bytes(CPU) == 50_100
    control_group(tmp_path, "a", version, "60000", 50_000)
    assert free_bytes(CPU) == 10_100
    control_group(tmp_path, "a", version, "60000", 70_000)
    assert free_bytes(CPU) == 0
    monkeypatch.setattr("sys.platform", "darwin")
    assert free_bytes(CPU) is None


def test_compress_stays_within_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model, largest = randomize_(OwnNet()).eval(), [0]
    images, labels = torch.rand(40, 3, 16, 16), torch.arange(40) % 5
    data = [(images[:20], labels[:20]), (images[20:], labels[20:])]

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].requires_grad:
            largest[0] = max(largest[0], len(inputs[0]))

    def run() -> rp.CompressResult:
        largest[0] = 0
        asked = {"evaluation": "pgd", "test": (images, labels), "calibration_images": 32}
        return rp.compress(model, data, prune_ratio=0.4, **asked)

    handle = model.register_forward_pre_hook(look)
    whole = run()
    assert largest[0] > 10
    needed = bytes_of_a_pass(model, images[:1])
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 20 * needed)
    narrow = run()
    handle.remove()
    assert largest[0] == 10
    assert any("takes no" in note for note in narrow.report["notes"])
    assert whole.plan.digest == narrow.plan.digest
