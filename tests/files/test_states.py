"""A state comes back as it was, tensor by tensor and type by type; a damaged one is one line."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robust_prune.files import read_state, write_state
from robust_prune.modules import random_states

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
        | st.dictionaries(st.sampled_from(["$tensor", "$tuple", "$x"]), inner, max_size=2)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equal, and of the same types; NaN is itself."""
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.stride()) == (b.dtype, b.stride()) and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


@given(plain)
def test_plain_values_come_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("state") / "s.safetensors"
    write_state(path, {"value": value})
    assert same(read_state(path), {"value": value})


def test_tensors_come_back_bit_for_bit_with_their_layout(tmp_path: Path) -> None:
    whole = torch.rand(4, 3, 5, 5)
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    state = {
        "tied": [whole, whole],
        "view": whole.view(-1)[7:20],
        "last": whole.to(memory_format=torch.channels_last),
        "none": torch.empty(0),
        "scalar": torch.tensor(2.5),
        "kinds": {str(kind): torch.tensor([0, 1, 1]).to(kind) for kind in kinds},
        "nan": torch.tensor([math.nan, -0.0, math.inf]).view(torch.int32),
        "random": random_states(torch.device("cpu")),
    }
    write_state(tmp_path / "s.safetensors", state)
    assert same(read_state(tmp_path / "s.safetensors"), state)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_an_optimizer_goes_on_from_its_file(tmp_path: Path, kind: str) -> None:
    net = nn.Linear(4, 3)
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.AdamW}[kind]
    optimizer = made(net.parameters(), lr=0.1, **({"momentum": 0.9} if kind == "sgd" else {}))
    net(torch.rand(2, 4)).sum().backward()
    optimizer.step()
    write_state(tmp_path / "s.safetensors", optimizer.state_dict())
    assert same(read_state(tmp_path / "s.safetensors"), optimizer.state_dict())


@pytest.mark.parametrize(
    "value", [object(), nn.Linear(1, 1), np.float64(1), random.Random(), len, {1, 2}]
)
def test_what_is_not_plain_is_refused_before_a_file_is_there(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match="plain data and tensors"):
        write_state(tmp_path / "s.safetensors", {"value": value})
    assert not list(tmp_path.iterdir())


def tree(state: Any, schema: Any = "robust-prune/state/1") -> str:
    return json.dumps({"schema": schema, "state": state})


HEADERS = {
    "of another version": tree({}, "robust-prune/state/2"),
    "no object": "[]",
    "not JSON": "{",
    "a list": tree([]),
    "no state": '{"schema": "robust-prune/state/1"}',
    "a missing tensor": tree({"a": {"$tensor": ["7", False]}}),
    "a tensor without a name": tree({"a": {"$tensor": []}}),
    "a tensor of a number": tree({"a": {"$tensor": 5}}),
    "four dimensions of one": tree({"a": {"$tensor": ["0", True]}}),
    "an unknown kind": tree({"a": {"$code": "import os"}}),
    "a tuple of a number": tree({"a": {"$tuple": 5}}),
    "keys that can't be": tree({"a": {"$pairs": [[[], 1]]}}),
    "pairs of three": tree({"a": {"$pairs": [[1, 2, 3]]}}),
    "no float": tree({"a": {"$float": "x"}}),
    "nested 100,000 deep": "[" * 10**5 + "]" * 10**5,
    "a tree 1,000 deep": '{"schema": "robust-prune/state/1", "state": '
    + '{"a":' * 900
    + "1"
    + "}" * 901,
    "a number of 100,000 digits": "9" * 10**5,
}


@pytest.mark.parametrize("name", list(HEADERS))
def test_a_damaged_header_is_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    header = {"robust_prune_state": HEADERS[name]}
    safetensors.torch.save_file({"0": torch.zeros(3)}, path, metadata=header)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each has its own reason
        read_state(path)
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_weights_are_no_state(tmp_path: Path) -> None:
    safetensors.torch.save_file({"0": torch.zeros(3)}, tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="no state of a run"):
        read_state(tmp_path / "s.safetensors")
