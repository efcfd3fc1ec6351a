"""Two ways to the same ridge solution, and rows of patches without unfolding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robust_prune.repair.layers import inputs_at
from robust_prune.repair.solving import solved, solved_by_fewer


@pytest.mark.parametrize(("rows", "inputs"), [(40, 12), (12, 40), (20, 20)])
def test_fewer_unknowns_give_the_same_weights(rows: int, inputs: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(rows, inputs).double(), torch.randn(rows, 5).double()
    old = torch.randn(5, inputs).double()
    error, expected = solved(x, y, old, 0.1)
    same, found = solved_by_fewer(x, y, old, 0.1)
    assert error == pytest.approx(same)
    assert expected is not None
    assert found is not None
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, old, atol=0.01)


def test_inputs_that_are_all_zero_leave_the_weights() -> None:
    x, y, old = torch.zeros(6, 4), torch.ones(6, 2), torch.ones(2, 4)
    assert solved(x, y, old, 0.1) == solved_by_fewer(x, y, old, 0.1) == (2.0, None)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 1, 1, 1), (7, 2, 3, 1), (1, 2, 0, 1), ((3, 5), (2, 1), (2, 0), (2, 1))],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_are_those_of_unfold(
    kernel: int, stride: int, padding: int, dilation: int, layout: torch.memory_format
) -> None:
    layer = nn.Conv2d(4, 6, kernel, stride, padding, dilation)
    x = torch.randn(3, 4, 17, 15).contiguous(memory_format=layout)
    places = layer(x).flatten(2).shape[2]
    positions = torch.randperm(places)[:9].sort().values
    whole = F.unfold(x, kernel, dilation, padding, stride)[:, :, positions]
    assert torch.equal(inputs_at(layer, x, positions), whole.transpose(1, 2).reshape(27, -1))
