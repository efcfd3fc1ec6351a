"""FAB's step onto a hyperplane: the optimum, and pyautoattack's own up to rounding."""

from __future__ import annotations

import pytest
import torch
from pyautoattack import fab_base
from pyautoattack.fab_projections import projection_linf
from pyautoattack.fab_pt import FABAttack_PT
from torch import Tensor, nn

from robust_prune.adversaries.hyperplanes import spare_sorting_, to_hyperplane

N, D = 40, 300


def problems(distance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return points, normals and offsets; some coordinates are at their limits, some unused."""
    draw = torch.Generator().manual_seed(0)
    points = torch.rand(N, D, generator=draw, dtype=torch.float64)
    points[:, :60], points[:, 60:90] = 0, 1
    normals = torch.randn(N, D, generator=draw, dtype=torch.float64) ** 3
    normals[:, ::9] = 0
    away = distance * torch.randn(N, generator=draw, dtype=torch.float64)
    return points, normals, (normals * points).sum(1) + away * normals.abs().sum(1)


@pytest.mark.parametrize("distance", [0.001, 0.05, 0.3, 2.0])
def test_steps_are_those_of_pyautoattack(distance: float) -> None:
    points, normals, offsets = problems(distance)
    step = to_hyperplane(points, normals, offsets)
    torch.testing.assert_close(step, projection_linf(points, normals, offsets), rtol=0, atol=1e-7)
    single = to_hyperplane(points.float(), normals.float(), offsets.float())
    torch.testing.assert_close(single.double(), step, rtol=0, atol=2e-6)


def test_steps_reach_the_plane_inside_the_cube_with_equal_sizes() -> None:
    points, normals, offsets = problems(0.05)
    step = to_hyperplane(points, normals, offsets)
    after = points + step
    torch.testing.assert_close((normals * after).sum(1), offsets)
    assert after.min() >= 0
    assert after.max() <= 1
    size = step.abs().amax(1, keepdim=True)
    inside = (after > 0) & (after < 1) & (normals != 0)
    assert inside.sum() > N * D / 3
    assert torch.equal(step.abs()[inside], size.expand(N, D)[inside])


def test_an_unreachable_plane_and_an_empty_normal() -> None:
    points = torch.tensor([[0.2, 0.7], [0.2, 0.7]])
    normals = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    step = to_hyperplane(points, normals, torch.tensor([9.0, 1.0]))
    torch.testing.assert_close(step, torch.tensor([[0.8, -0.7], [0.0, 0.0]]))


def test_only_the_attack_that_is_asked_spares_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 4))
    images = torch.rand(9, 3, 3, 3)
    labels = model(images).argmax(1)
    calls = []
    theirs = fab_base.projection_linf

    def counted(*args: Tensor) -> Tensor:
        calls.append(args)
        return theirs(*args)

    monkeypatch.setattr(fab_base, "projection_linf", counted)
    plain, spared = (
        FABAttack_PT(model, n_iter=5, eps=0.3, n_target_classes=3, targeted=True) for _ in range(2)
    )
    spare_sorting_(spared)
    ours = spared.perturb(images, labels)
    assert not calls
    torch.testing.assert_close(ours, plain.perturb(images, labels), rtol=0, atol=1e-5)
    assert calls
    assert bool((model(ours).argmax(1) != labels).any())
