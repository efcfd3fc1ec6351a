"""What lies beside the weights that are taken: heads, layers in a sequence, averages, numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robust_prune.errors import ModelError
from tests.models.networks import IDENTITY, MEAN, MU, SIGMA, STD, network, opened, same, under

NET = network()
STATE = NET.state_dict()
BODY = {name: tensor for name, tensor in STATE.items() if not name.startswith("fc.")}
HEAD = {name.removeprefix("fc."): t for name, t in STATE.items() if name.startswith("fc.")}

APART = {
    "mmpretrain's": under("backbone.", BODY) | under("head.fc.", HEAD),
    "two names": under("features.", BODY) | under("classifier.", HEAD),
    "beside a loss": under("net.", BODY) | under("top.", HEAD) | under("criterion.", HEAD),
}


@pytest.mark.parametrize("name", list(APART))
def test_a_head_beside_the_body_is_the_networks(name: str, tmp_path: Path) -> None:
    model, said = opened(tmp_path, {"state_dict": APART[name]}, **IDENTITY)
    assert same(model, NET)
    assert "the network's 'fc' is 'state_dict." in said[0]


def test_a_head_in_another_mapping_is_not(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="2 names missing"):
        opened(tmp_path, {"body": BODY, "probe": HEAD})


SEQUENCES: dict[str, nn.Module] = {
    "a layer behind": nn.Sequential(NET, nn.Linear(10, 5)),
    "a layer before": nn.Sequential(nn.Conv2d(3, 3, 1), NET),
    "statistics before": nn.Sequential(nn.BatchNorm2d(3, affine=False), NET),
    "inside of a module": nn.ModuleDict({"a": nn.Sequential(NET, nn.Linear(10, 5))}),
}


@pytest.mark.parametrize("name", list(SEQUENCES))
def test_other_layers_of_its_sequence_are_refused(name: str, tmp_path: Path) -> None:
    for content in (SEQUENCES[name].state_dict(), {"model": SEQUENCES[name].state_dict()}):
        with pytest.raises(ModelError, match="2 unexpected"):
            opened(tmp_path, content, **IDENTITY)


def test_entries_of_a_list_in_the_file_are_no_sequence(tmp_path: Path) -> None:
    content = [{"probe": torch.ones(3)}, STATE, {"2": {"weight": torch.ones(3)}}]
    model, _ = opened(tmp_path, content, **IDENTITY)
    assert same(model, NET)


@pytest.mark.parametrize("key", ["non_ema", "no_ema", "model_without_ema", "unaveraged", "notEMA"])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_said_to_be_no_average_is_not_taken(key: str, first: bool, tmp_path: Path) -> None:
    other = network(1).state_dict()
    content = {key: other, "weights": STATE} if first else {"weights": STATE, key: other}
    model, said = opened(tmp_path, content, **IDENTITY)
    assert same(model, NET)
    assert f"said to be no average, 'weights' is taken, and '{key}' is not" in said[-1]


@pytest.mark.parametrize("key", ["EMAModel", "model_wa", "wa_state_dict", "netEMA"])
def test_averages_are_known_by_these_names_too(key: str, tmp_path: Path) -> None:
    average = network(1)
    model, _ = opened(tmp_path, {"model": STATE, key: average.state_dict()}, **IDENTITY)
    assert same(model, average)


@pytest.mark.parametrize("pair", [("mean_", "std_"), ("mean_tensor", "std_tensor"), ("mu", "std")])
def test_a_pair_of_buffers_is_known_by_what_is_the_same_in_its_names(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    for prefix in ("", "prep."):
        buffers = under(prefix, {pair[0]: MU, pair[1]: SIGMA})
        model, _ = opened(tmp_path, under("net.", STATE) | buffers)
        assert model.spec.mean == pytest.approx(MEAN)
        assert model.spec.std == pytest.approx(STD)


NO_PAIRS: dict[str, dict[str, Any]] = {
    "reciprocals": {"mean": MU, "inv_std": 1 / SIGMA},
    "two kinds": {"mean_image": MU, "std_noise": SIGMA},
    "accuracies": {"scores": {"acc_mean": [0.91, 0.92, 0.9], "acc_std": [0.01, 0.02, 0.01]}},
    "accuracies in %": {"scores": {"acc_mean": [91.0, 92.0, 90.0], "acc_std": [1.0, 0.4, 2.0]}},
    "initial weights": {"init": {"mean": [0.0], "std": [0.02]}},
}


@pytest.mark.parametrize("name", list(NO_PAIRS))
def test_what_is_no_normalisation_is_left(name: str, tmp_path: Path) -> None:
    _, said = opened(tmp_path, {"model": STATE, "other": NO_PAIRS[name]})
    assert said[0].startswith("normalisation assumed")
