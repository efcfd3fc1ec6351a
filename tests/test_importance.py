"""MRSImportance inside plain torch-pruning code."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch_pruning as tp

import robust_prune.importance
from robust_prune import MRSImportance, ThreatModel
from robust_prune.errors import UsageError
from robust_prune.graph import ModelGraph, count_cost
from robust_prune.types import Curve
from tests.conftest import TINY, tiny_resnet

WIDE = {**TINY, "channels": [32, 48, 64, 96], "stem_width": 16}


def prepared(**more: object) -> tuple[torch.nn.Module, torch.Tensor, MRSImportance]:
    net = tiny_resnet(**WIDE).net
    images = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(32) % 10
    importance = MRSImportance(
        net, (images, labels), threat=ThreatModel.linf("8/255"), steps=2, n=32, **more
    )
    return net, images, importance


def pruned_widths(
    net: torch.nn.Module, images: torch.Tensor, importance: MRSImportance, ratio: float
) -> tuple[dict[str, int], dict[str, int]]:
    """Widths before and after one global step of torch-pruning."""
    before = {g.name: g.width for g in ModelGraph(net, (3, 32, 32)).groups}
    tp.pruner.BasePruner(
        net,
        images[:1],
        importance=importance,
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[net.fc],
    ).step()
    return before, {g.name: g.width for g in ModelGraph(net, (3, 32, 32)).groups}


def test_by_curves_the_cheapest_loss_per_multiply_add_goes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free, dear = "layer3.0.conv1", "layer2.0.conv1"
    rises = {free: 0.0, dear: 50.0}

    def curves(model: object, graph: ModelGraph, *args: object) -> dict[str, Curve]:
        return {
            g.name: Curve(g.name, (0.5, 1.0), _line(rises.get(g.name, 1.0))) for g in graph.groups
        }

    monkeypatch.setattr(robust_prune.importance, "structural_curves", curves)
    net, images, importance = prepared()
    assert "rule=curve" in repr(importance)
    before, after = pruned_widths(net, images, importance, 0.3)
    assert after[free] == pytest.approx(0.2 * before[free], abs=1)
    assert after[dear] == before[dear]
    assert sum(after.values()) == pytest.approx(0.7 * sum(before.values()), abs=3)
    assert net(images).shape == (32, 10)


def _line(rise: float) -> tuple[float, float]:
    return rise / 2, rise


@pytest.mark.parametrize("rule", ["mrs", "uniform", "inverted"])
def test_global_pruning_removes_the_share_of_each_group_that_mrs_says(rule: str) -> None:
    net, images, importance = prepared(rule=rule)
    before, after = pruned_widths(net, images, importance, 0.4)
    removed = {name: 1 - after[name] / before[name] for name in before}
    # one threshold t: each group loses min(t * willingness, 0.95), up to one channel
    total = sum(before.values())
    low, high = 0.0, 20.0
    for _ in range(60):
        t = (low + high) / 2
        gone = sum(min(t * importance.willingness[n], 0.95) * width for n, width in before.items())
        low, high = (t, high) if gone < 0.4 * total else (low, t)
    for name, width in before.items():
        expected = min(t * importance.willingness[name], 0.95)
        assert removed[name] == pytest.approx(expected, abs=1.6 / width), name
    assert sum(after.values()) == pytest.approx(0.6 * total, abs=2)
    assert net(images).shape == (32, 10)
    if rule == "uniform":
        assert max(removed.values()) - min(removed.values()) < 0.05
    else:
        assert max(removed.values()) - min(removed.values()) > 0.2


def test_it_says_what_it_uses() -> None:
    _, _, importance = prepared(rule="inverted", score="l2")
    assert repr(importance) == (
        "MRSImportance(rule=inverted, score=l2, MRS=first-order on 32 images, PGD-2 linf 8/255, "
        "seed=0)"
    )


def test_local_pruning_and_several_steps_work() -> None:
    net, images, importance = prepared()
    pruner = tp.pruner.BasePruner(
        net,
        images[:1],
        importance=importance,
        pruning_ratio=0.5,
        iterative_steps=2,
        ignored_layers=[net.fc],
    )
    pruner.step()
    pruner.step()
    assert net.layer1[0].conv1.out_channels == 16
    assert net(images).shape == (32, 10)


def test_forgetting_to_ignore_the_classifier_is_an_error() -> None:
    net, images, importance = prepared()
    with pytest.raises(UsageError, match="ignored_layers"):
        tp.pruner.BasePruner(
            net, images[:1], importance=importance, global_pruning=True, pruning_ratio=0.4
        ).step()


def test_another_model_is_an_error() -> None:
    _, images, importance = prepared()
    other = tiny_resnet(**WIDE).net
    with pytest.raises(UsageError, match="same model"):
        tp.pruner.BasePruner(
            other,
            images[:1],
            importance=importance,
            pruning_ratio=0.4,
            ignored_layers=[other.fc],
        ).step()


def test_the_example_of_the_readme_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    section = readme.split("**Inside torch-pruning.**")[1]
    code = section.split("```python")[1].split("```")[0]
    images, labels = torch.rand(8, 3, 64, 64), torch.arange(8)
    monkeypatch.chdir(tmp_path)
    names = {"images": images, "labels": labels}
    exec(code, names)
    model = names["model"].eval()
    dense = timm.create_model("mobilevit_xxs", num_classes=10)
    left, before = (sum(p.numel() for p in m.parameters()) for m in (model, dense))
    assert left < 0.7 * before
    again = robust_prune.load("pruned.safetensors", arch="mobilevit_xxs")
    state = again.net.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model(images).shape == (8, 10)


def test_the_budget_of_the_pages_is_met_as_it_stands() -> None:
    page = (Path(__file__).parent.parent / "docs" / "torch-pruning.md").read_text()
    section = page.split("## A budget in multiply-adds")[1]
    code = section.split("```python")[1].split("```")[0]
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    names = {"images": images, "labels": labels, "ThreatModel": ThreatModel}
    exec(code, {"MRSImportance": MRSImportance, **names}, names)
    dense = count_cost(timm.create_model("resnet18", num_classes=10), (3, 32, 32)).macs
    assert count_cost(names["model"], (3, 32, 32)).macs / dense == pytest.approx(0.5, abs=0.01)


def test_grouped_convolutions_lose_whole_units() -> None:
    torch.manual_seed(0)
    net = timm.create_model("resnext50_32x4d", layers=(1, 1, 1, 1), num_classes=10).eval()
    images, labels = torch.rand(8, 3, 64, 64), torch.arange(8)
    importance = MRSImportance(net, (images, labels), rule="uniform", score="l2", steps=1, n=8)
    before = {g.name: g.width for g in ModelGraph(net, (3, 64, 64)).groups}
    tp.pruner.BasePruner(
        net,
        images[:1],
        importance=importance,
        global_pruning=True,
        pruning_ratio=0.5,
        ignored_layers=[net.fc],
    ).step()
    after = {g.name: g.width for g in ModelGraph(net, (3, 64, 64)).groups}
    assert all(0.2 <= 1 - after[n] / before[n] <= 0.75 for n in before), after
    assert sum(after.values()) == pytest.approx(0.5 * sum(before.values()), rel=0.1)
    assert net(images).shape == (8, 10)
