"""Compressing where residual blocks may go whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from typer.testing import CliRunner

from robust_prune import PruningPlan, compress, load, save
from robust_prune.adversaries import adversarial_set
from robust_prune.cli import app
from robust_prune.criteria import block_rises, branch_means
from robust_prune.errors import BudgetError, UsageError
from robust_prune.graph import ModelGraph
from robust_prune.modules import ImageModel, empty_blocks, network_of
from robust_prune.pipeline import CompressResult
from robust_prune.repair import fill_constants_, kept_rows
from robust_prune.types import ThreatModel
from tests.conftest import tiny_resnet
from tests.pipeline.test_run_folder import CrashError, fail_after

IDLE = "layer3.0"  # its branch gives next to nothing
LINF = ThreatModel.linf(1e-5)  # next to none: random networks withstand nothing


def pictures() -> torch.Tensor:
    """Images of four fields each."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.rand(64, 3, 2, 2, generator=generator)
        .repeat_interleave(16, 2)
        .repeat_interleave(16, 3)
    )


@torch.no_grad()
def idle_resnet() -> ImageModel:
    """A model that is sure of what it says, and does not need one of its blocks."""
    model = tiny_resnet(num_classes=5)
    model.get_submodule(f"net.{IDLE}.bn2").weight.fill_(1e-3)
    head = model.get_submodule("net.fc")
    head.weight.mul_(5 / model(pictures()).std(0).mean())
    head.bias.sub_(model(pictures()).mean(0))
    return model


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and what the model says of them."""
    return pictures(), idle_resnet()(pictures()).argmax(1)


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [tuple(part) for part in zip(*(t.split(16) for t in images()), strict=True)]  # type: ignore[misc]


def shorter(**more: Any) -> CompressResult:
    """What blocks have to go for: no group may lose more than half of its channels."""
    asked = {"prune_ratio": 0.8, "max_prune_ratio": 0.5, "calibration_images": 32, "threat": LINF}
    return compress(idle_resnet(), data(), **{**asked, "blocks": True, **more})


def test_blocks_go_that_cost_least_and_all_is_told(tmp_path: Path) -> None:
    result = shorter()
    gone = list(empty_blocks(network_of(result.model)))
    assert IDLE in gone
    assert list(result.plan.blocks) == gone
    assert f"residual blocks that went whole: {', '.join(gone)}" in result.report["notes"]
    empty = [group for group in result.plan.groups if not group.keep]
    assert [group.name.rpartition(".")[0] for group in empty] == gone
    assert {group.note for group in empty} == {"its block goes whole"}
    rises = result.report["blocks"]
    assert rises[IDLE] == min(rises.values(), key=abs)
    assert result.report["self_check"]["error"] < 1e-7
    assert result.plan.reached == pytest.approx(0.8, abs=0.03)

    save(result.model, tmp_path / "small.safetensors")
    x, _ = images()
    assert torch.equal(load(tmp_path / "small.safetensors")(x), result.model(x))
    said = CliRunner().invoke(app, ["info", str(tmp_path / "small.safetensors")]).output
    for name in gone:
        assert f"{name} went whole: what is left of it is its skip and a constant" in said
    plan = PruningPlan.from_json(result.plan.to_json())
    replayed = compress(idle_resnet(), data(), plan=plan, calibration_images=32, threat=LINF)
    assert all(
        torch.equal(a, b)
        for a, b in zip(replayed.model.parameters(), result.model.parameters(), strict=True)
    )


def test_what_can_go_counts_blocks() -> None:
    with pytest.raises(BudgetError, match=r"at most (8\d|9\d)\.\d % can go") as caught:
        shorter(prune_ratio=0.99)
    most = float(re.findall(r"--ratio (0\.\d+)", str(caught.value))[0])
    assert shorter(prune_ratio=most).plan.reached > most - 0.01


def test_channels_alone_unless_asked() -> None:
    with pytest.raises(BudgetError, match="is out of reach"):
        shorter(blocks=False)
    plain = shorter(blocks=False, prune_ratio=0.5)
    assert all(plain.plan.widths.values())
    assert "blocks" not in plain.report


@pytest.mark.parametrize("part", ["planned-1", "pruned-1"])
def test_a_run_that_is_cut_short_goes_on(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shorter()
    with monkeypatch.context() as patched:
        fail_after(part, patched)
        with pytest.raises(CrashError):
            shorter(run_dir=tmp_path / "run")
    again = shorter(run_dir=tmp_path / "run", resume=True)
    pairs = zip(again.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_constant_is_what_the_branch_adds_on_average() -> None:
    model = tiny_resnet(num_classes=5)
    graph = ModelGraph(model, (3, 32, 32))
    block = next(b for b in graph.blocks if b.form.skip)
    x, _ = images()
    pieces: dict[str, torch.Tensor] = {}
    module = model.net.get_submodule(block.name)
    module.bn2.register_forward_hook(lambda _m, _x, y: pieces.update(branch=y.clone()))
    means = branch_means(model, [block], x)
    with torch.no_grad():
        model(x)
    assert_close(means[block.name], pieces["branch"].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_constants_stand_for_branches_in_what_comes_out() -> None:
    result = shorter(reconstruct=False)
    graph = ModelGraph(idle_resnet(), (3, 32, 32))
    pruned, rows = graph.pruned(result.plan), kept_rows(graph, result.plan)
    for name, block in empty_blocks(network_of(result.model)).items():
        masked = network_of(pruned).get_submodule(name).constant
        assert not torch.allclose(block.constant, masked, atol=1e-4)
    sizes = {block.name: block.cost.constant.shape[0] for block in graph.blocks}
    means = {name: torch.arange(float(sizes[name])) for name in result.plan.blocks}
    fill_constants_(pruned, means, rows)
    for name, block in empty_blocks(network_of(pruned)).items():
        kept = rows[name][0] if name in rows else torch.arange(sizes[name])
        assert torch.equal(block.constant.detach(), kept.float())


def test_rises_are_of_models_that_lack_one_block() -> None:
    model, (x, labels) = idle_resnet(), images()
    graph = ModelGraph(model, (3, 32, 32))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    attacked = adversarial_set(model, x, labels, threat=LINF, seed=0)
    rises = block_rises(model, graph.blocks, attacked, passes=1000)
    assert rises.keys() == {block.name for block in graph.blocks}
    assert abs(rises[IDLE]) < 0.01 < 0.1 < max(rises.values())
    assert not empty_blocks(model.net)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"allocation": "uniform"}, "--blocks: not with --allocation uniform"),
        ({"prune_steps": 2, "finetune": "pgd-at", "epochs": 2}, "--blocks: not with 2 pruning"),
    ],
)
def test_blocks_that_can_not_be_decided_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        shorter(**options)


def test_the_command_says_which_blocks_went(tmp_path: Path) -> None:
    path = save(idle_resnet(), tmp_path / "dense.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    found = CliRunner().invoke(
        app,
        [
            *("compress", str(path), "--ratio", "0.6", "--blocks", "--eval", "none"),
            *("--calibration-images", "16", "--out", str(out)),
        ],
    )
    assert found.exit_code == 0, found.output
    assert isinstance(load(out / "dense-pruned.safetensors"), ImageModel)
