"""What a group keeps in any pruner of torch-pruning, and budgets on what is left."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn

import robust_prune as rp
from robust_prune import MRSImportance
from robust_prune.errors import BudgetError, DataError, ModelError, UsageError
from robust_prune.graph import count_cost
from tests.conftest import tiny_resnet

WIDTHS = 20, 40, 60
RATIOS = 0.3, 0.75, 0.85, 0.97, 1.0


def convolution(before: int, after: int) -> nn.Sequential:
    layer = nn.Conv2d(before, after, 3, 2, 1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU())


def chain(*widths: int) -> nn.Sequential:
    """Convolutions of these widths, and a classifier."""
    torch.manual_seed(0)
    ends = zip((3, *widths), widths, strict=False)
    parts = [convolution(before, after) for before, after in ends]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)
    return nn.Sequential(*parts, *head).eval()


def measured(model: nn.Module, **more: Any) -> MRSImportance:
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return MRSImportance(model, (images, torch.arange(16) % 10), steps=1, n=16, **more)


MODEL = chain(*WIDTHS)
BY_RULE = {rule: measured(MODEL, rule=rule) for rule in ("curve", "mrs", "uniform")}


def pruned(
    importance: MRSImportance,
    ratio: float,
    *,
    pruner: Any = tp.pruner.BasePruner,
    ignored: tuple[int, ...] = (-1,),
    **options: Any,
) -> tuple[list[int], list[str]]:
    """Widths that a pruner leaves of a copy, and the warnings that it gave."""
    importance = copy.deepcopy(importance)
    model: Any = importance._model
    fresh = {name: {} for name in ("in_channel_groups", "out_channel_groups", "num_heads")}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = pruner(
            model,
            torch.rand(1, 3, 32, 32),
            importance=importance,
            pruning_ratio=ratio,
            ignored_layers=[model[i] for i in ignored],
            **fresh,
            **options,
        )
        for _ in range(options.get("iterative_steps", 1)):
            made.step()
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    return widths, [str(w.message) for w in caught if "were to go" in str(w.message)]


MODES = [
    {"global_pruning": True},
    {"global_pruning": False},
    {"global_pruning": True, "iterative_steps": 3},
    {"global_pruning": False, "iterative_steps": 3},
    {"global_pruning": True, "isomorphic": True},
    {"global_pruning": True, "round_to": 8},
    {"global_pruning": False, "round_to": 8},
    {"global_pruning": True, "pruner": tp.pruner.GroupNormPruner},
    {"global_pruning": True, "pruner": tp.pruner.GrowingRegPruner},
    {"global_pruning": True, "pruner": tp.pruner.BNScalePruner},
]


@pytest.mark.parametrize(
    ("rule", "mode"),
    [*(("curve", mode) for mode in MODES), *(("mrs", mode) for mode in MODES[:4])],
    ids=str,
)
def test_more_asked_is_never_less_removed_and_the_floor_holds(
    rule: str, mode: dict[str, Any]
) -> None:
    least = [4, 8, 12] if rule == "curve" else [2, 2, 3]  # 20 and 5 % of 20, 40, 60; at least 2
    before = list(WIDTHS)
    for ratio in RATIOS:
        widths, said = pruned(BY_RULE[rule], ratio, **mode)
        assert all(w >= floor for w, floor in zip(widths, least, strict=True)), (ratio, widths)
        assert sum(widths) <= sum(before), (ratio, widths, before)
        if "round_to" not in mode:
            assert not said or ratio > 0.75, said
            assert said or ratio < 0.97
        if not mode["global_pruning"]:
            assert all(w <= b for w, b in zip(widths, before, strict=True))
        before = widths
    assert before == least


def test_what_is_out_of_reach_is_said() -> None:
    _, said = pruned(BY_RULE["curve"], 0.95, global_pruning=True)
    assert said == [
        "114 of the 120 channels of 2.0 and 2 more groups were to go, 96 can: the others are the "
        "least that each group keeps of its dense width, or can't be removed"
    ]
    _, said = pruned(BY_RULE["curve"], 0.95, global_pruning=False)
    assert [line.split(" were to go")[0] for line in said] == [
        "57 of the 60 channels of 2.0",
        "38 of the 40 channels of 1.0",
        "19 of the 20 channels of 0.0",
    ]


def test_several_steps_go_as_far_as_one() -> None:
    for global_pruning in (True, False):
        one, _ = pruned(BY_RULE["uniform"], 0.6, global_pruning=global_pruning)
        several, _ = pruned(
            BY_RULE["uniform"], 0.6, global_pruning=global_pruning, iterative_steps=4
        )
        assert several == pytest.approx(one, abs=1)


def test_a_floor_that_is_a_multiple_of_round_to() -> None:
    for importance in (
        measured(MODEL, round_to=8),
        measured(MODEL, rule="uniform", max_prune_ratio=0.5, round_to=8),
    ):
        for global_pruning in (True, False):
            widths, _ = pruned(importance, 0.95, global_pruning=global_pruning, round_to=8)
            assert widths == ([8, 8, 16] if importance.rule == "curve" else [16, 24, 32])


def test_a_share_that_the_user_sets_binds() -> None:
    importance = measured(MODEL, rule="uniform", max_prune_ratio=0.5)
    for mode in MODES[:7]:
        widths, _ = pruned(importance, 0.95, **mode)
        assert all(w >= n // 2 for w, n in zip(widths, WIDTHS, strict=True)), mode
        assert "round_to" in mode or widths == [10, 20, 30]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_prune_ratio": 1.5},
        {"round_to": 0},
        {"steps": 0},
        {"n": 0},
        {"batch_size": 0},
        {"rule": "curves"},
    ],
)
def test_limits_out_of_range_are_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        MRSImportance(MODEL, None, **wrong)


def test_ignored_layers_stay_and_the_others_have_their_floor() -> None:
    widths, said = pruned(BY_RULE["curve"], 0.95, ignored=(1, -1), global_pruning=True)
    assert widths == [4, 40, 12]
    assert said[0].startswith("76 of the 80 channels of 2.0 and 1 more groups")


def test_tiny_layers_keep_two_channels() -> None:
    importance = measured(chain(2, 3, 1, 24))
    for ratio in (0.5, 1.0):
        for mode in MODES[:6]:
            widths, _ = pruned(importance, ratio, **mode)
            assert widths[:3] == [2, pytest.approx(2, abs=1), 1], (ratio, mode)
            assert widths[3] >= 5


def test_a_group_of_two_wide_units_keeps_one() -> None:
    model = chain(8, 16)
    model[1][0] = nn.Conv2d(8, 16, 3, 2, 1, groups=4, bias=False)
    importance = measured(model, rule="mrs")
    with rp.dependency_graph():
        pruner = tp.pruner.BasePruner(
            model, torch.rand(1, 3, 32, 32), importance, pruning_ratio=0.5, num_heads={}
        )
    assert [(g.units, g.blocks) for g in pruner.DG.groups] == [(2, 4), (4, 4)]
    pruner.step()
    assert [g.units for g in pruner.DG.groups] == [1, 2]


def test_features_are_not_taken_for_logits() -> None:
    model = tiny_resnet(num_classes=0)
    for each in (model, model.net):
        with pytest.raises(ModelError, match="ends before a classifier: its 32 outputs are feat"):
            measured(each)
    behind = nn.Sequential(model, nn.Linear(32, 10))
    assert measured(behind, rule="mrs").sensitivity.modules[-1].name == "1"


def test_labels_outside_the_models_classes_are_refused() -> None:
    with pytest.raises(DataError, match=r"labels must lie in 0\.\.9"):
        MRSImportance(MODEL, (torch.rand(4, 3, 32, 32), torch.arange(4) + 9), n=4)


def test_layers_that_cannot_be_pruned_are_kept_whole_and_said() -> None:
    class Rolled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.roll(1, 1)  # channels in an order of the code's

    model = chain(8, 16, 24)
    model.insert(2, Rolled())
    importance = measured(model)
    widths, said = pruned(importance, 0.6, global_pruning=True)
    assert widths == [2, 16, 5]
    assert "can't be removed" in said[0]


def test_places_in_a_ranking_of_several_groups_are_refused() -> None:
    model = chain(16, 16, 16, 16)
    with pytest.raises(UsageError, match="global_pruning=True"):
        pruned(measured(model), 0.5, isomorphic=True)


def test_scores_stay_finite_for_sparse_training() -> None:
    importance = copy.deepcopy(BY_RULE["curve"])
    model: Any = importance._model
    pruner = tp.pruner.GroupNormPruner(
        model, torch.rand(1, 3, 32, 32), importance=importance, ignored_layers=[model[-1]]
    )
    model.train()(torch.rand(4, 3, 32, 32)).square().mean().backward()
    pruner.regularize(model)
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert type(parameter.grad) is torch.Tensor


@pytest.mark.parametrize(
    ("asked", "more"),
    [
        (0.3, {}),
        (0.5, {}),
        (0.75, {}),
        (0.5, {"target": "params"}),
        (0.5, {"global_pruning": False}),
        (0.5, {"iterative_steps": 2}),
        (0.5, {"pruner": tp.pruner.GroupNormPruner}),
        (0.5, {"isomorphic": True}),
    ],
    ids=str,
)
def test_a_budget_is_met_within_a_point(asked: float, more: dict[str, Any]) -> None:
    model = tiny_resnet(channels=[32, 48, 64, 96], stem_width=16).net
    importance = measured(model, rule="uniform")
    dense = count_cost(model, (3, 32, 32))
    pruner = importance.for_budget(
        asked, torch.rand(1, 3, 32, 32), ignored_layers=[model.fc], **more
    )
    assert count_cost(model, (3, 32, 32)) == dense  # nothing is pruned before the first step
    for _ in range(more.get("iterative_steps", 1)):
        pruner.step()
    target = more.get("target", "macs")
    left = count_cost(model, (3, 32, 32)).of(target) / dense.of(target)
    close = 0.03 if more.get("global_pruning") is False else 0.01  # all groups lose one at a time
    assert left == pytest.approx(1 - asked, abs=close)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_a_budget_takes_the_pruners_limits_for_its_own() -> None:
    model = chain(*WIDTHS)
    pruner = measured(model).for_budget(
        0.5,
        torch.rand(1, 3, 32, 32),
        ignored_layers=[model[-1]],
        max_pruning_ratio=0.5,
        round_to=4,
    )
    pruner.step()
    widths = [model[i][0].out_channels for i in range(3)]
    assert all(w >= n // 2 and w % 4 == 0 for w, n in zip(widths, WIDTHS, strict=True)), widths


def test_a_budget_out_of_reach_says_what_is_possible() -> None:
    model = chain(*WIDTHS)
    importance = measured(model)
    inputs, ignored = torch.rand(1, 3, 32, 32), [model[-1]]
    with pytest.raises(BudgetError, match=r"99\.0 % of the macs is out of reach: at most 9"):
        importance.for_budget(0.99, inputs, ignored_layers=ignored)
    with pytest.raises(UsageError, match="between 0 and 1"):
        importance.for_budget(1.5, inputs, ignored_layers=ignored)
    with pytest.raises(UsageError, match="pruning_ratio"):
        importance.for_budget(0.5, inputs, target="channels", ignored_layers=ignored)
    few = chain(4, 4)
    with pytest.warns(UserWarning, match="too narrow for a closer fit"):
        measured(few).for_budget(0.1, inputs, ignored_layers=[few[-1]])
