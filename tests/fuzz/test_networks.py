"""The law of pruning on networks and plans that nobody chose: pruned is masked, or refused."""

from __future__ import annotations

import copy
import os

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from robust_prune.errors import ModelError
from robust_prune.graph import ModelGraph, count_cost, mask_, prune_
from robust_prune.modules import difference
from tests.fuzz.networks import NETWORKS, SIDE, Drawn, Network
from tests.graph.test_graph import random_widths_plan

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "50"))
SIZE = (3, SIDE, SIDE)
LIMIT = 1e-10
# a network that fails is short text as it is; making it shorter takes minutes for each
AS_DRAWN = (Phase.explicit, Phase.reuse, Phase.generate)


@torch.no_grad()
def check(drawn: Drawn, data: st.DataObject, whole_heads: bool = False) -> ModelGraph | None:
    """The graph where the network is accepted; AssertionError where pruning is not masking."""
    model = Network(drawn).double().eval()
    images = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = model(images)
    try:
        graph = ModelGraph(model, SIZE, whole_heads=whole_heads, min_width=1)
    except ModelError:
        return None
    assert difference(model(images), before) == 0, "the graph changed the model"
    if not graph.groups:
        assert graph.unprunable
        return graph
    plan = random_widths_plan(graph, data)
    pruned, masked = copy.deepcopy(model), copy.deepcopy(model)
    prune_(pruned, plan)
    mask_(masked, plan)
    assert difference(pruned(images), masked(images)) < LIMIT
    counted = count_cost(pruned, SIZE)
    assert (counted.macs, counted.params) == (plan.pruned.macs, plan.pruned.params)
    return graph


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow],
    phases=AS_DRAWN,
)
@given(NETWORKS, st.booleans(), st.data())
def test_any_network_is_pruned_as_masking_does_or_says_what_stays(
    drawn: Drawn, whole_heads: bool, data: st.DataObject
) -> None:
    check(drawn, data, whole_heads)
