"""Which multiple of channels a device is fast at: found from times, used by plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import robust_prune as rp
from robust_prune.errors import UsageError
from robust_prune.graph import ModelGraph
from robust_prune.latency import Conditions, fast_multiple, rounding
from robust_prune.options import AUTO, PlanningOptions
from tests.conftest import tiny_resnet
from tests.pipeline.test_run_folder import CrashError, fail_after, own_data

ONE = Conditions(2, 1, "float32", "a device")
WIDE = {"channels": [32, 48, 64, 96]}


def device_of_blocks(block: int, timed: list[int]) -> Callable[..., list[float]]:
    """Times of a device whose kernels work on blocks of channels, a bit slower within one."""

    def times(modules: Any, images: Any, *more: Any) -> list[float]:
        outputs = [next(m.parameters()).shape[0] for m in modules]
        timed.extend(outputs)
        return [-(-n // block) * block + 0.01 * (n % block > 0) for n in outputs]

    return times


@pytest.mark.parametrize("block", [1, 4, 8, 16, 32])
def test_the_block_of_a_device_is_found(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []
    monkeypatch.setattr(rounding, "alternating", device_of_blocks(block, timed))
    found = fast_multiple(ModelGraph(tiny_resnet(**WIDE), (3, 32, 32), probe=False), ONE)
    assert found.multiple == block
    assert len(found.layers) == rounding.LAYERS
    assert len(timed) == 6 * rounding.LAYERS


def test_a_network_of_narrow_layers_is_not_rounded() -> None:
    graph = ModelGraph(tiny_resnet(channels=[8, 8, 8, 8]), (3, 32, 32), probe=False)
    assert fast_multiple(graph, ONE).multiple == 1


def test_a_real_device_has_some_multiple() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 4)).eval()
    found = fast_multiple(ModelGraph(net, (3, 4, 4), probe=False), ONE)
    assert found.multiple in (1, *rounding.MULTIPLES)
    assert set(found.saved) == set(rounding.MULTIPLES)


def test_plans_have_widths_of_that_multiple_and_say_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timed: list[int] = []
    monkeypatch.setattr(rounding, "alternating", device_of_blocks(16, timed))
    asked: dict[str, Any] = {"allocation": "uniform", "calibration_images": 2, "verify": False}
    model = tiny_resnet(num_classes=5, **WIDE)
    result = rp.compress(model, own_data(), round_to="auto", **asked)
    whole = {g.name: g.width for g in result.plan.groups}
    assert all(g.keep_width % 16 == 0 or g.width < 16 for g in result.plan.groups)
    assert any(g.keep_width < whole[g.name] for g in result.plan.groups)
    assert any("multiples of 16" in note for note in result.report["notes"])
    same = rp.compress(model, own_data(), round_to=16, **asked)
    assert same.plan.digest == result.plan.digest
    with monkeypatch.context() as patch:
        fail_after("rounded", patch)
        with pytest.raises(CrashError):
            rp.compress(model, own_data(), round_to="auto", run_dir=tmp_path / "run", **asked)
    timed.clear()
    again = rp.compress(
        model, own_data(), round_to="auto", run_dir=tmp_path / "run", resume=True, **asked
    )
    assert (again.plan.digest, timed) == (result.plan.digest, []), "it is not measured anew"


def test_what_is_no_multiple_is_one_line() -> None:
    assert PlanningOptions(round_to="auto").round_to == AUTO
    assert PlanningOptions(round_to="8").round_to == 8
    for wrong in ("0", "fast", "1.5", -1):
        with pytest.raises(UsageError, match="round to"):
            PlanningOptions(round_to=wrong)
