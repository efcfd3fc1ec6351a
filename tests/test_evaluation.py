"""Evaluation: honest counts, the same images for both models, and nothing left changed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robust_prune import evaluate
from robust_prune.adversaries import pgd_correct
from robust_prune.data import DataSplits, as_split
from robust_prune.errors import AttackError, DataError, ModelError, UsageError
from robust_prune.evaluation import draw
from robust_prune.repair import recalibrate_batchnorm_
from robust_prune.statistics import Proportion
from robust_prune.types import Measurement, ThreatModel, to_plain
from tests.conftest import OwnNet, tiny_resnet
from tests.oracles import linear_classifier, near_middle
from tests.shortened import shorten


def test_robust_accuracy_of_a_plane_is_the_share_out_of_reach() -> None:
    model = linear_classifier().float()
    images = near_middle(300, model.shape).float()
    labels = model(images).argmax(1)
    labels[:30] = 1 - labels[:30]
    distance = model.distance(images, "linf").detach()
    eps = float(distance.median())
    right = pgd_correct(
        model, images, labels, threat=ThreatModel.linf(eps), steps=20, seed=0, batch_size=100
    )
    expected = (distance > eps) & (torch.arange(300) >= 30)
    clear = (distance / eps - 1).abs() > 0.02
    assert torch.equal(right[clear], expected[clear])


def test_evaluate_leaves_model_and_generators_as_they_were() -> None:
    model = tiny_resnet().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    torch.set_rng_state(states[0])
    result = evaluate(model, (images, labels), attack="pgd", n=8)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.attack for m in result.measurements] == ["clean", "pgd"]
    assert result.cost.params == sum(p.numel() for p in model.parameters())
    json.dumps(to_plain(result), allow_nan=False)


def test_two_models_are_compared_on_the_same_images(digits: DataSplits) -> None:
    test = draw(digits.test, 40, seed=3)
    again = draw(digits.test, 40, seed=3)
    assert torch.equal(test.images, again.images)
    one = evaluate(Constant(0), test, attack="none")
    two = evaluate(Constant(1), test, attack="none")
    paired = one.compare(two)["clean"]
    assert paired.first_only == int((test.labels == 0).sum())
    assert paired.second_only == int((test.labels == 1).sum())


class Constant(nn.Module):
    """Always answers one class."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.answer = answer
        self.layer = nn.Conv2d(1, 10, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(torch.full((len(images),), self.answer), 10).float()


class Tuple(nn.Module):
    """Gives (logits, features), as some repositories' models do."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.flatten(1), images


@pytest.mark.parametrize(
    ("labels", "model", "error", "message"),
    [
        (torch.full((8,), 10), None, DataError, r"labels must lie in 0\.\.9"),
        (torch.arange(8), Tuple(), ModelError, r"must give logits \[N, K\], not tuple"),
    ],
)
def test_models_and_labels_that_do_not_fit(
    labels: torch.Tensor, model: nn.Module | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate(model or tiny_resnet(), (torch.rand(8, 3, 32, 32), labels), attack="none")


def test_a_model_of_more_outputs_than_the_data_has_classes_is_refused(digits: DataSplits) -> None:
    model = tiny_resnet(in_chans=1, num_classes=12)
    few = digits.test.take(8, seed=0)
    of_known_classes = replace(digits, test=as_split(few))
    for data in (digits, digits.test, draw(digits.test, 8, seed=0), of_known_classes):
        with pytest.raises(DataError, match="12 outputs, the data has 10 classes"):
            evaluate(model, data, attack="none", n=8)
    assert evaluate(model, few, attack="none").n == 8


def test_unknown_attacks_and_counts_are_errors() -> None:
    data = (torch.rand(8, 3, 32, 32), torch.arange(8))
    with pytest.raises(UsageError, match="attack 'fgsm'"):
        evaluate(tiny_resnet(), data, attack="fgsm")
    with pytest.raises(UsageError, match="at least 1"):
        evaluate(tiny_resnet(), data, n=0)


def test_batch_norm_is_measured_anew_and_everything_else_stays() -> None:
    model = OwnNet().train()
    images = torch.rand(64, 3, 16, 16)
    weights = {k: v.clone() for k, v in model.named_parameters()}
    batches = [(part, None) for part in images.split(16)]
    assert recalibrate_batchnorm_(model, batches) == 1
    with torch.no_grad():
        inputs = model.first(images)
    torch.testing.assert_close(model.norm.running_mean, inputs.mean((0, 2, 3)))
    means_of_batches = torch.stack([p.var((0, 2, 3)) for p in inputs.split(16)]).mean(0)
    torch.testing.assert_close(model.norm.running_var, means_of_batches)
    assert model.norm.momentum == 0.1
    assert model.training
    assert all(torch.equal(v, weights[k]) for k, v in model.named_parameters())


def test_every_image_counts_alike_in_batch_norm_however_small_the_last_batch() -> None:
    model = OwnNet()
    images = torch.rand(66, 3, 16, 16) + torch.arange(66).view(
        -1, 1, 1, 1
    )  # the last two stand out
    recalibrate_batchnorm_(model, [(part, None) for part in images.split(64)])
    with torch.no_grad():
        inputs = model.first(images)
    torch.testing.assert_close(model.norm.running_mean, inputs.mean((0, 2, 3)))


def test_a_paired_test_takes_the_same_images() -> None:
    data = (torch.rand(8, 3, 32, 32), torch.arange(8))
    first = evaluate(tiny_resnet(), data, attack="none")
    assert first.compare(first)["clean"].p_value == 1
    for other in (replace(first, seed=1), replace(first, split="validation")):
        with pytest.raises(UsageError, match="same images"):
            first.compare(other)


def test_batch_norm_keeps_its_statistics_where_no_batch_serves_or_one_fails() -> None:
    model = tiny_resnet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert recalibrate_batchnorm_(model, [(torch.rand(1, 3, 32, 32), None)]) == 0

    def failing() -> object:
        yield torch.rand(4, 3, 32, 32), None
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        recalibrate_batchnorm_(model, failing())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training
    assert recalibrate_batchnorm_(nn.Linear(3, 2), []) == 0


def test_an_image_that_is_wrong_when_clean_is_never_robust() -> None:
    class RightOnlyWhenMoved(nn.Module):
        """Answers 0 on the images it knows, 1 on all others."""

        def __init__(self, known: torch.Tensor) -> None:
            super().__init__()
            self.known = known

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            same = (images == self.known).flatten(1).all(1)
            answer = nn.functional.one_hot((~same).long(), 2).to(images.dtype)
            return answer + 0 * images.flatten(1).sum(1, keepdim=True)

    images = 0.2 + 0.6 * torch.rand(6, 3, 4, 4)
    right = pgd_correct(
        RightOnlyWhenMoved(images),
        images,
        torch.ones(6, dtype=torch.long),
        threat=ThreatModel.linf(0.1),
        steps=2,
        seed=0,
    )
    assert not right.any()


def test_measurements_that_are_there_are_not_made_again() -> None:
    model = tiny_resnet()
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = (images, torch.arange(6))
    known = Measurement("pgd", Proportion(5, 6), (True,) * 5 + (False,))
    made: list[str] = []
    found = evaluate(
        model, data, attack="pgd", n=6, done=[known], on_measured=lambda m: made.append(m.attack)
    )
    assert found.get("pgd") is known
    assert made == ["clean"]


class Rounding(nn.Module):
    """A network behind a step function: its gradient is zero everywhere."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner((images * 16).round() / 16)


class Saturated(Rounding):
    """Logits so far apart that the softmax has no gradient."""

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images) * 1e6


class Detached(Rounding):
    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inner(images)


@pytest.mark.parametrize("kind", [Rounding, Saturated])
def test_masked_gradients_are_flagged(kind: type[Rounding]) -> None:
    torch.manual_seed(0)
    model = kind(OwnNet()).eval()
    images = torch.rand(20, 3, 16, 16)
    data = (images, model(images).argmax(1))
    measured = evaluate(model, data, attack="pgd", n=20).get("pgd")
    assert measured is not None
    assert measured.details["without_gradient"] == measured.accuracy.successes > 0
    assert f"masked gradients: {measured.accuracy.successes} of 20 images" in measured.flags[0]
    plain = evaluate(OwnNet().eval(), data, attack="pgd", n=20).get("pgd")
    assert plain is not None
    assert (plain.flags, plain.details["without_gradient"]) == ((), 0)


def test_a_model_without_gradients_is_one_line() -> None:
    model, images = Detached(OwnNet()).eval(), torch.rand(4, 3, 16, 16)
    with pytest.raises(AttackError, match="no gradient reaches the images"):
        evaluate(model, (images, model(images).argmax(1)), n=4)


def test_autoattacks_warnings_are_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    torch.manual_seed(0)
    model = Rounding(OwnNet()).eval()
    images = torch.rand(8, 3, 8, 8)
    found = evaluate(model, (images, model(images).argmax(1)), n=8)
    flags = found.measurements[-1].flags
    assert flags
    assert len(flags) == len(set(flags))
