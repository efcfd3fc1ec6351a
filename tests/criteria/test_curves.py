"""Structural curves, allocation by them, and the search over composed models."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_prune.adversaries import adversarial_loss, adversarial_set
from robust_prune.adversaries import quick as quick_copy
from robust_prune.allocation import (
    EVEN,
    CostOf,
    Problem,
    allocate_by_curves,
    best_composed,
    candidate_widths,
    make_plan,
)
from robust_prune.allocation import search as search_module
from robust_prune.criteria import (
    channel_scores,
    masked,
    removal_prices,
    structural,
    structural_curves,
)
from robust_prune.criteria import curves as curves_module
from robust_prune.errors import BudgetError
from robust_prune.graph import ModelGraph
from robust_prune.types import (
    LARGEST_RISE,
    Budget,
    ChannelGroup,
    Cost,
    Curve,
    PruningPlan,
    ThreatModel,
)
from tests.conftest import OwnNet, randomize_, tiny_resnet

SIZE = (3, 32, 32)
WIDE = ModelGraph(tiny_resnet(channels=[32, 64, 96, 128], stem_width=16), SIZE)
NAMES = [group.name for group in WIDE.groups]


def problem(budget: Budget, **limits: Any) -> Problem:
    return Problem(WIDE.groups, WIDE.cost, budget, **limits)


def straight(slopes: dict[str, float]) -> dict[str, Curve]:
    return {n: Curve(n, (0.5, 1.0), (s / 2, s)) for n, s in slopes.items()}


def plan_of(graph: ModelGraph, widths: dict[str, int], size: tuple[int, int, int]) -> PruningPlan:
    scores = channel_scores(graph.model, graph, score="l2")
    return make_plan(
        Problem(graph.groups, graph.cost, Budget("macs", 0.5)),
        widths,
        {n: s.tolist() for n, s in scores.items()},
        allocation="given",
        score="l2",
        seed=0,
        input_size=size,
    )


def test_a_point_of_a_curve_is_the_loss_of_the_pruned_model(
    images: torch.Tensor, labels: torch.Tensor, threat: ThreatModel
) -> None:
    model = randomize_(OwnNet(width=8, classes=10)).double().eval()
    images = images[:, :, :16, :16].double()
    adversarial = adversarial_set(model, images, labels, threat=threat, steps=1)
    graph = ModelGraph(model, (3, 16, 16))
    scores = channel_scores(model, graph, score="l2")
    curves = structural_curves(model, graph, scores, adversarial, shares=(0.5,))
    base = adversarial_loss(model, adversarial)
    for group in graph.groups:
        widths = {g.name: g.width // 2 if g is group else g.width for g in graph.groups}
        pruned = graph.pruned(plan_of(graph, widths, (3, 16, 16)))
        rise = adversarial_loss(pruned, adversarial) - base
        assert curves[group.name].rises[0] == pytest.approx(rise, abs=1e-9), group.name


@pytest.mark.parametrize("make", [tiny_resnet, lambda: OwnNet(width=8, classes=10)])
def test_what_lies_in_front_of_a_group_is_computed_once_for_all_points(
    make: Callable[[], nn.Module],
    images: torch.Tensor,
    labels: torch.Tensor,
    threat: ThreatModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = randomize_(make()).eval()
    adversarial = adversarial_set(model, images, labels, threat=threat, steps=1, batch_size=5)
    graph = ModelGraph(model, SIZE)
    scores = channel_scores(model, graph, score="l2")
    ran: list[int] = []
    conv2d = torch.nn.functional.conv2d

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        ran.append(1)
        return conv2d(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "conv2d", counting)

    def measured() -> tuple[dict[str, Curve], int]:
        ran.clear()
        return structural_curves(model, graph, scores, adversarial), len(ran)

    found, short = measured()
    monkeypatch.setattr(curves_module, "_proven", lambda *_: {})
    expected, whole = measured()
    assert found == expected
    assert short < 0.7 * whole


class LeavesBehind(nn.Module):
    """What a layer gave in front is read behind, past the modules between; by a hook or not."""

    def __init__(self, hook: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 10)
        self.left: dict[str, torch.Tensor] = {}
        inner = nn.Sequential(self.block)
        if hook:
            inner.register_forward_hook(lambda m, x, y: self.left.update(x=y))
        else:
            self.block.register_forward_hook(lambda m, x, y: self.left.update(x=y))
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [N, 10]."""
        y = self.inner(self.stem(x).relu())
        z: torch.Tensor = self.third(self.second(y.relu()).relu()) + self.left["x"]
        logits: torch.Tensor = self.fc(z.relu().mean((2, 3)))
        return logits


@pytest.mark.parametrize("hook", [False, True])
def test_what_modules_in_front_leave_behind_is_that_of_the_same_pass(
    hook: bool, images: torch.Tensor, labels: torch.Tensor, threat: ThreatModel
) -> None:
    torch.manual_seed(0)
    model = LeavesBehind(hook).eval()
    adversarial = adversarial_set(model, images, labels, threat=threat, steps=1)
    graph = ModelGraph(model, SIZE)
    scores = channel_scores(model, graph, score="l2")
    curves = structural_curves(model, graph, scores, adversarial, shares=(0.25, 0.5, 0.75))
    base = adversarial_loss(model, adversarial)
    assert len(curves) > 1
    for name, curve in curves.items():
        for share, rise in zip(curve.shares, curve.rises, strict=True):
            gone = torch.zeros(8, dtype=torch.bool)
            gone[scores[name].argsort(stable=True)[: round(8 * share)]] = True
            with masked(model, graph, name, gone):
                assert rise == adversarial_loss(model, adversarial) - base, name


def test_masking_puts_every_weight_back_even_after_an_error() -> None:
    model = tiny_resnet()
    graph = ModelGraph(model, SIZE)
    before = copy.deepcopy(model.state_dict())
    gone = torch.zeros(graph.groups[0].units, dtype=torch.bool)
    gone[0] = True
    changed: list[str] = []

    def fail() -> None:
        with masked(model, graph, graph.groups[0].name, gone):
            changed.extend(n for n, t in model.state_dict().items() if not t.equal(before[n]))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert changed
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_structural_mrs_is_the_curve_at_one_half(
    images: torch.Tensor, labels: torch.Tensor, threat: ThreatModel
) -> None:
    model = tiny_resnet()
    graph = ModelGraph(model, SIZE)
    adversarial = adversarial_set(model, images, labels, threat=threat, steps=1)
    curves = structural_curves(
        model, graph, channel_scores(model, graph, score="l2"), adversarial, shares=(0.25, 0.75)
    )
    found = structural(graph, curves, adversarial)
    first = curves[graph.groups[0].name]
    assert found.of_groups()[first.group] == pytest.approx(max(sum(first.rises) / 2, 0))
    assert found.method == "structural"


def test_a_curve_by_hand() -> None:
    curve = Curve("g", (0.25, 0.5, 0.75, 1.0), (0.4, -0.1, 0.5, 2.0))
    assert curve.at(0.0) == 0
    assert curve.at(0.125) == pytest.approx(0.2)
    assert curve.at(0.625) == pytest.approx(0.2)
    assert curve.at(1.0) == 2.0
    assert Curve("g", (0.5, 0.9), (0.0, 0.8)).at(1.0) == pytest.approx(1.0)  # the line goes on
    # made to rise (0.4, 0.4, 0.5, 2) and convex from below: 0 to 0.5 at 0.75 is one straight line
    hull = curve.hull()
    assert hull.shares == (0.75, 1.0)
    assert hull.rises == (0.5, 2.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-0.2, 3), min_size=6, max_size=6))
def test_hulls_lie_below_never_fall_and_get_steeper(rises: list[float]) -> None:
    curve = Curve("g", (0.15, 0.3, 0.45, 0.6, 0.75, 0.9), tuple(rises))
    hull = curve.hull()
    highest = 0.0
    for share, rise in zip(curve.shares, rises, strict=True):
        highest = max(highest, rise)
        assert hull.at(share) <= highest + 1e-9
    xs, ys = (0.0, *hull.shares), (0.0, *hull.rises)
    slopes = [(ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i]) for i in range(len(xs) - 1)]
    assert slopes[0] >= 0
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(slopes))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["macs", "params", "channels"]),
    st.floats(0.05, 0.7),
    st.sampled_from([1, 4]),
    st.lists(st.floats(1e-3, 10), min_size=len(NAMES), max_size=len(NAMES)),
)
def test_curves_meet_every_budget(
    target: str, ratio: float, round_to: int, values: list[float]
) -> None:
    budget = Budget(target, ratio)  # type: ignore[arg-type]
    curves = straight(dict(zip(NAMES, values, strict=True)))
    widths = allocate_by_curves(problem(budget, round_to=round_to), curves)
    removed = 1 - WIDE.cost(widths).of(budget.target) / WIDE.cost().of(budget.target)
    assert removed == pytest.approx(ratio, abs=0.01 * round_to)
    for group in WIDE.groups:
        assert group.min_width <= widths[group.name] <= group.width
        assert widths[group.name] % round_to == 0


def test_what_costs_nothing_goes_first_and_only_so_far() -> None:
    free = NAMES[3]
    curves = straight({n: 0.0 if n == free else 1.0 for n in NAMES})
    budget = Budget("macs", 0.3)
    widths = allocate_by_curves(problem(budget, max_prune_ratio=0.75), curves)
    by_name = {g.name: g for g in WIDE.groups}
    assert widths[free] == by_name[free].width // 4
    with pytest.raises(BudgetError, match="at most"):
        allocate_by_curves(problem(Budget("macs", 0.9), max_prune_ratio=0.5), curves)


def group(name: str, width: int) -> ChannelGroup:
    return ChannelGroup(name=name, width=width, blocks=1, min_width=2, members=(name,), readers=())


def channels_of(groups: tuple[ChannelGroup, ...]) -> CostOf:
    def cost(widths: Mapping[str, int]) -> Cost:
        total = sum(widths.get(g.name, g.width) for g in groups)
        return Cost(total, total, total)

    return cost


def test_it_ends_where_nothing_is_left_to_give() -> None:
    groups = (group("a", 40), group("b", 40))
    curves = straight({"a": 1.0, "b": 2.0})
    for ratio in (0.8, 0.9):
        budget = Budget("channels", ratio)
        widths = allocate_by_curves(
            Problem(groups, channels_of(groups), budget, max_prune_ratio=ratio), curves
        )
        assert widths == {g.name: round(40 * (1 - ratio)) for g in groups}


def test_widths_become_multiples_even_where_dense_ones_are_none() -> None:
    groups = (group("a", 20), group("b", 36), group("c", 64))
    curves = straight({"a": 1.0, "b": 1.0, "c": 1.0})
    for ratio in (0.3, 0.5, 0.6):
        budget = Budget("channels", ratio)
        widths = allocate_by_curves(
            Problem(groups, channels_of(groups), budget, round_to=8), curves
        )
        for g in groups:
            assert widths[g.name] % 8 == 0 or widths[g.name] == g.width


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0.01, 3), min_size=len(NAMES), max_size=len(NAMES)))
def test_the_heap_takes_the_steps_of_counting_every_price_anew(slopes: list[float]) -> None:
    curves = {n: Curve(n, (0.5, 1.0), (s / 4, s)) for n, s in zip(NAMES, slopes, strict=True)}
    dense = WIDE.cost().macs
    widths = {g.name: g.width for g in WIDE.groups}
    floor = {g.name: max(g.min_width, round(g.width * 0.05)) for g in WIDE.groups}
    while WIDE.cost(widths).macs > 0.5 * dense:
        now = WIDE.cost(widths).macs
        prices = {}
        for g in WIDE.groups:
            after = max(widths[g.name] - max(1, g.width // 24), floor[g.name])
            if after < widths[g.name]:
                share, before = 1 - after / g.width, 1 - widths[g.name] / g.width
                rise = curves[g.name].at(share) - curves[g.name].at(before)
                rise += EVEN * (share**2 - before**2)
                prices[g.name] = (rise / (now - WIDE.cost({**widths, g.name: after}).macs), after)
        cheapest = min(prices, key=lambda n: prices[n][0])
        widths[cheapest] = prices[cheapest][1]
    # a budget that the last step meets leaves nothing to fit
    budget = Budget("macs", 1 - (WIDE.cost(widths).macs + 0.5) / dense)
    assert allocate_by_curves(problem(budget), curves) == widths


def test_equals_share_what_costs_nothing() -> None:
    groups = tuple(group(name, 40) for name in "abcd")
    widths = allocate_by_curves(
        Problem(groups, channels_of(groups), Budget("channels", 0.25)),
        straight(dict.fromkeys("abcd", 0.0)),
    )
    assert widths == dict.fromkeys("abcd", 30)


def test_candidates_go_from_uniform_to_free_at_one_cost() -> None:
    curves = straight({n: float(i) for i, n in enumerate(NAMES)})
    budget = Budget("macs", 0.5)
    found = candidate_widths(problem(budget), curves)
    most = [max(1 - w[g.name] / g.width for g in WIDE.groups) for w in found]
    assert most == sorted(most)
    assert most[0] < 0.35
    assert most[-1] > 0.6
    for widths in found:
        assert WIDE.cost(widths).macs == pytest.approx(0.5 * WIDE.cost().macs, rel=0.02)


def test_the_search_takes_the_plan_that_hurts_least(
    images: torch.Tensor,
    labels: torch.Tensor,
    threat: ThreatModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = OwnNet(width=8, classes=10).eval()
    graph = ModelGraph(model, (3, 32, 32))
    with torch.no_grad():
        model.out.weight.mul_(20)
        model.hidden.weight[10:] = 0  # half of the hidden units are dead
        model.hidden.bias[10:] = -1
    labels = model(images).argmax(1)
    whole = {g.name: g.width for g in graph.groups}
    harmless = plan_of(graph, {**whole, "hidden": 10}, SIZE)
    harmful = plan_of(graph, {**whole, "hidden": 2}, SIZE)
    repaired: list[nn.Module] = []
    best, losses = best_composed(
        graph,
        [harmful, harmless],
        images,
        labels,
        threat=threat,
        seed=0,
        repair_=lambda pruned, plan: repaired.append(pruned),
    )
    assert best == 1
    assert losses[1] < losses[0]
    assert len(repaired) == 2
    copies: list[nn.Module] = []

    def quick(pruned: nn.Module, images: torch.Tensor) -> nn.Module:
        copies.append(pruned)
        return quick_copy(pruned, images)

    monkeypatch.setattr(search_module, "quick", quick)
    same, through_copies = best_composed(
        graph, [harmful, harmless], images, labels, threat=threat, seed=0, stand_in=True
    )
    assert same == best
    assert through_copies == pytest.approx(losses, rel=1e-3)
    assert len(copies) == 2
    monkeypatch.setattr(
        search_module, "adversarial_loss", lambda *_, lost=[math.nan, 1.0]: lost.pop(0)
    )
    unsound = best_composed(graph, [harmful, harmless], images, labels, threat=threat, seed=0)
    assert unsound[0] == 1, "a loss that is no number is no reason to stay with the first"
    assert model.hidden.out_features == 20


def test_a_loss_that_is_not_finite_leaves_other_prices_as_they_are(resnet: nn.Module) -> None:
    graph = ModelGraph(resnet, (3, 32, 32))
    names = [group.name for group in graph.groups]
    curves = {n: Curve(n, (0.3, 0.6, 0.9), (0.1 * i, 0.3 * i, i), 8) for i, n in enumerate(names)}
    broken = {**curves, names[1]: Curve(names[1], (0.3, 0.6, 0.9), (0.1, 0.3, LARGEST_RISE), 8)}
    gone = torch.tensor([0.1, 0.5, 0.8])
    before, after = removal_prices(graph, curves), removal_prices(graph, broken)
    for name in names:
        kept = 2 if name == names[1] else 3
        assert torch.equal(before[name](gone)[:kept], after[name](gone)[:kept])
        assert after[name](gone).isfinite().all()
    assert after[names[1]](gone)[2] > max(float(after[n](gone).max()) for n in names[2:])
