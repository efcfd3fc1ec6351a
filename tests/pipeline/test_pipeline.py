"""compress as people call it from Python, on their own modules and data."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import robust_prune
from robust_prune import PruningPlan, ThreatModel, compress, load, report, save, sensitivity
from robust_prune.errors import (
    BudgetError,
    DataError,
    Interrupted,
    ModelError,
    PlanError,
    UsageError,
)
from robust_prune.finetune import TrainingConfig
from robust_prune.graph import ModelGraph, count_cost
from robust_prune.pipeline import Events, Settings, compress_file, measuring
from robust_prune.types import Budget, Sensitivity
from tests.conftest import OwnNet, randomize_, tiny_resnet


def own_data(n: int = 48, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, 3, 16, 16, generator=generator), torch.arange(n) % classes


def test_an_own_class_with_a_loader_stays_untouched_and_gets_its_own_class_back() -> None:
    model = randomize_(OwnNet(width=16)).train()
    model.first.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    loader = DataLoader(TensorDataset(*own_data()), batch_size=8)
    rng = torch.get_rng_state()
    result = compress(
        model,
        loader,
        prune_ratio=0.5,
        target="params",
        threat=ThreatModel.l2(0.5),
        allocation="uniform",
        score="l2",
        protect=["skip"],
        seed=1,
        test=own_data(12),
        evaluation="pgd",
    )
    assert torch.equal(torch.get_rng_state(), rng)
    assert isinstance(result.model, OwnNet)
    assert not result.model.training
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not result.model.first.weight.requires_grad
    assert result.model.hidden.weight.requires_grad
    assert result.plan.reached == pytest.approx(0.5, abs=0.05)
    assert count_cost(result.model, (3, 16, 16)).params == result.plan.pruned.params
    assert {u.name: u.reason for u in result.plan.unprunable}["skip"].startswith("protected")
    json.loads(report.to_json(result.report))


@pytest.mark.parametrize("finetune", ["n-fgsm", "own function"])
def test_fine_tuning_by_name_and_by_an_own_function(finetune: str) -> None:
    calls = []

    def method(m: nn.Module, images: torch.Tensor, labels: torch.Tensor, attack: object):
        calls.append(images.shape)
        return nn.functional.cross_entropy(m(attack(m, images, labels)), labels)  # type: ignore[operator]

    chosen = method if finetune == "own function" else finetune
    result = compress(
        randomize_(OwnNet()), own_data(), finetune=chosen, epochs=1, batch_size=16, attack_steps=1
    )
    assert len(result.report["finetune"]["epochs"]) == 2
    assert bool(calls) == (finetune == "own function")
    assert result.report["status"] == "fine-tuned"


def test_the_same_seed_gives_the_same_result_and_a_plan_replays_it_bit_for_bit() -> None:
    model, data = tiny_resnet(), (torch.rand(32, 3, 32, 32), torch.arange(32) % 10)
    one = compress(model, data, seed=3, n_eval=4)
    two = compress(model, data, seed=3, n_eval=4)
    assert one.plan == two.plan
    assert one.plan.digest == two.plan.digest
    replayed = compress(
        model, data, seed=3, plan=PruningPlan.from_json(one.plan.to_json()), n_eval=4
    )
    for other in (two, replayed):
        mine, theirs = one.model.state_dict(), other.model.state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in mine.items())


def test_a_plan_of_unknown_rules_is_replayed_without_scores() -> None:
    model, data = tiny_resnet(), (torch.rand(32, 3, 32, 32), torch.arange(32) % 10)
    plan = dataclasses.replace(
        compress(model, data, allocation="uniform").plan, allocation="mine", score="by hand"
    )
    replayed = compress(model, data, plan=plan, allocation=plan.allocation, score=plan.score)
    assert replayed.plan.digest == plan.digest
    assert "scores" not in replayed.report["seconds"]


def test_every_allocation_is_another_plan() -> None:
    model, data = tiny_resnet(), (torch.rand(32, 3, 32, 32), torch.arange(32) % 10)
    widths = {
        rule: tuple(g.keep_width for g in compress(model, data, allocation=rule).plan.groups)
        for rule in ("curve", "mrs", "inverted", "uniform")
    }
    assert len(set(widths.values())) == 4


def test_without_data_it_says_so_and_still_delivers() -> None:
    model = tiny_resnet()
    result = compress(model, None, calibration_images=16)
    assert any("stand-in photographs" in note for note in result.report["notes"])
    assert result.report["data"] is None
    assert result.report["calibration"]["source"] == "stand-in photographs"
    assert "points" in result.report["calibration"]["grade"]
    assert result.plan.reached == pytest.approx(0.5, abs=0.01)
    with pytest.raises(DataError, match="need data"):
        compress(model, None, finetune="trades", epochs=1)
    untuned = compress(model, None, finetune="none", calibration_images=16)
    assert untuned.report["finetune"] is None


def test_calibration_never_sees_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = measuring.adversarial_set

    def spy(model: nn.Module, images: torch.Tensor, *args: object, **kwargs: object):
        seen.append(images)
        return original(model, images, *args, **kwargs)

    monkeypatch.setattr(measuring, "adversarial_set", spy)
    images = torch.linspace(0, 1, 60).view(60, 1, 1, 1).expand(60, 3, 16, 16).contiguous()
    labels = torch.arange(60) % 5
    compress(
        randomize_(OwnNet()),
        (images[:40], labels[:40]),
        test=(images[40:], labels[40:]),
        evaluation="none",
    )
    assert float(seen[0].max()) <= float(images[39].max()) + 1e-6


def test_a_loaders_sampler_decides_what_is_seen() -> None:
    images = torch.linspace(0, 1, 64).view(64, 1, 1, 1).expand(64, 3, 16, 16).contiguous()
    data = TensorDataset(images, torch.arange(64) % 5)
    loader = DataLoader(data, batch_size=8, sampler=SubsetRandomSampler(range(10)))
    from robust_prune.data import as_split

    assert len(as_split(loader)) == 10
    assert float(as_split(loader).take(10, 0)[0].max()) < 0.2


def test_sensitivity_from_python() -> None:
    model = tiny_resnet().train()
    before = copy.deepcopy(model.state_dict())
    for data in ((torch.rand(24, 3, 32, 32), torch.arange(24) % 10), None):
        result = sensitivity(model, data, n=16, input_size=(3, 32, 32))
        assert isinstance(result, Sensitivity)
        assert len(result.groups) == len(ModelGraph(model, (3, 32, 32)).groups)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_group_that_breaks_the_model_is_left_alone_and_named() -> None:
    class Fixed(OwnNet):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.norm(self.first(images)))
            x = torch.relu(self.grouped(x)) + self.skip(x)
            x = nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
            hidden = torch.relu(self.hidden(x))
            if hidden.shape[1] != 20:
                raise RuntimeError("the hidden width is written into the code")
            return self.out(hidden)

    result = compress(randomize_(Fixed(width=32)), own_data(), prune_ratio=0.4)
    reasons = {u.name: u.reason for u in result.plan.unprunable}
    assert "written into the code" in reasons["hidden"]
    assert result.plan.reached == pytest.approx(0.4, abs=0.05)
    assert result.model(own_data()[0]).shape == (48, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prune_ratio": 1.5}, UsageError, "between 0 and 1"),
        ({"prune_ratio": 0.999}, BudgetError, "out of reach"),
        ({"target": "flops"}, UsageError, "target 'flops'"),
        ({"allocation": "best"}, UsageError, "allocation 'best'"),
        ({"score": "l3"}, UsageError, "score 'l3'"),
        ({"epochs": 2}, UsageError, "method and epochs"),
        ({"allocatoin": "mrs"}, UsageError, "'allocatoin' is not known; did you mean 'allocation'"),
        ({"ratio": 0.5}, UsageError, "'ratio' is not known; did you mean 'prune_ratio'"),
        ({"eval": "pgd"}, UsageError, "did you mean 'evaluation'"),
        ({"eps": "8/255"}, UsageError, "did you mean 'threat'"),
        ({"threat": "8/255"}, UsageError, "a ThreatModel, as"),
        ({"resume": True}, UsageError, "name it with run_dir"),
        ({"input_size": (3, 64, 64)}, UsageError, "not that of the images"),
        ({"optimizer": "no such"}, UsageError, "optimizer 'no such' is not known"),
        ({"seed": 2**70}, UsageError, "seed .* must be in"),
        ({"finetune": "free", "epochs": 1}, UsageError, "'free' is not known"),
        ({"finetune": "trades", "epochs": 1, "lr": -1.0}, UsageError, "learning rate"),
        ({"protect": ["nothing"]}, UsageError, "no layer is called 'nothing'"),
        ({"evaluation": "pgd"}, DataError, "no test split"),
    ],
)
def test_mistakes_are_explained(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compress(tiny_resnet(), (torch.rand(24, 3, 32, 32), torch.arange(24) % 10), **arguments)


def test_what_is_not_as_asked_is_in_the_notes() -> None:
    model = nn.Sequential(tiny_resnet(num_classes=5), nn.Softmax(1)).eval()
    notes = compress(model, own_data(), allocation="uniform").report["notes"]
    assert any("probabilities" in note for note in notes)
    assert any("measured on 43 images, not 512" in note for note in notes), notes
    plain = compress(tiny_resnet(num_classes=5), own_data(), allocation="uniform")
    assert not any("probabilities" in note for note in plain.report["notes"])
    with pytest.raises(BudgetError, match=r"multiples of 256 .* --round-to 256, or prot"):
        compress(tiny_resnet(num_classes=5), own_data(), round_to=256)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_models_of_other_types_are_told_to_be_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model, data = OwnNet().to(dtype), own_data()
    kind = str(dtype).removeprefix("torch.")
    for attempt in (
        lambda: compress(model, data, run_dir=tmp_path / "run"),
        lambda: compress_file(model, None, Settings(), tmp_path / "out", "m", Events()),
        lambda: sensitivity(model, data),
        lambda: robust_prune.evaluate(model, data),
        lambda: robust_prune.MRSImportance(model, data),
    ):
        with pytest.raises(ModelError, match=rf"{kind} \(first.weight\).*model\.float\(\)"):
            attempt()
    assert not list(tmp_path.iterdir())


def test_images_in_float64_are_pruned_with() -> None:
    images, labels = own_data()
    one = compress(randomize_(OwnNet()), (images.double(), labels), allocation="uniform")
    two = compress(randomize_(OwnNet()), (images, labels), allocation="uniform")
    assert one.plan.reached == two.plan.reached


def test_a_pruned_model_that_is_not_the_masked_one_is_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = ModelGraph.apply_

    def careless(self: ModelGraph, plan: PruningPlan) -> None:
        remove(self, plan)
        with torch.no_grad():
            self.model.net.layer2[0].conv2.weight[:, 0] += 0.1

    monkeypatch.setattr(ModelGraph, "apply_", careless)
    model, folder = tiny_resnet(), tmp_path / "out"
    for verify in (True, False):
        settings = Settings(allocation="uniform", score="l2", calibration_images=4, verify=verify)
        if verify:
            with pytest.raises(PlanError, match="is not the masked dense one"):
                compress_file(model, None, settings, folder, "m", Events())
            assert not folder.exists()
        else:
            result, _ = compress_file(model, None, settings, folder, "m", Events())
            assert "not compared with the masked dense one" in " ".join(result.report["notes"])
            assert result.report["self_check"] == {"done": False}


def test_the_self_check_and_the_reach_are_in_the_report() -> None:
    result = compress(tiny_resnet(), None, prune_ratio=0.4, allocation="uniform", score="l2")
    assert result.report["self_check"]["error"] < 1e-12
    assert result.report["reachable"] > 0.99
    assert "equal the masked dense one's" in report.check_line(result.report)


def test_stopping_at_any_station_leaves_a_usable_file_or_none(tmp_path: Path) -> None:
    from robust_prune.data import from_iterable

    images = torch.rand(40, 3, 32, 32), torch.arange(40) % 10
    splits = from_iterable(images, test=images)
    settings = Settings(
        budget=Budget("macs", 0.5),
        finetune="n-fgsm",
        epochs=2,
        batch_size=8,
        evaluation="pgd",
        n_eval=8,
        calibration_images=8,
    )
    model = tiny_resnet()

    def attempt(folder: Path, **events: object) -> str:
        with pytest.raises(Interrupted) as caught:
            compress_file(model, splits, settings, folder, "m", Events(**events))
        return str(caught.value)

    def stop_at(text: str) -> object:
        def stage(line: str) -> None:
            if text in line:
                raise KeyboardInterrupt

        return stage

    first = tmp_path / "first"
    assert "no file was written" in attempt(first, stage=stop_at("sensitivity"))
    assert not first.exists()

    def in_training(progress: object) -> None:
        if progress.epoch == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    for folder, status, events in (
        ("second", "pruned", {"stage": stop_at("fine-tuning")}),
        ("third", "fine-tuning interrupted", {"training": in_training}),
        ("fourth", "fine-tuned", {"stage": stop_at("evaluation")}),
    ):
        message = attempt(tmp_path / folder, **events)
        assert f"status is '{status}'" in message
        assert load(tmp_path / folder / "m.safetensors")(images[0]).shape == (40, 10)
        assert json.loads((tmp_path / folder / "report.json").read_text())["status"] == status
        assert not list((tmp_path / folder).glob(".*"))


def test_the_report_holds_what_a_claim_needs(tmp_path: Path) -> None:
    data = torch.rand(40, 3, 32, 32), torch.arange(40) % 10
    result = compress(
        tiny_resnet(),
        data,
        finetune="n-fgsm",
        epochs=1,
        batch_size=16,
        test=data,
        evaluation="pgd",
        n_eval=20,
    )
    record = result.report
    paired = record["evaluation"]["paired"]["pgd"]
    for which in ("dense", "pruned_before_finetuning", "pruned"):
        found = record["evaluation"][which]
        assert (found["n"], found["seed"], found["split"]) == (20, 0, "test")
        assert found["threat"] == {"norm": "linf", "eps": 8 / 255}
        accuracy = found["measurements"][1]["accuracy"]
        assert accuracy["interval"][0] <= accuracy["value"] <= accuracy["interval"][1]
    dense, pruned = (
        record["evaluation"][w]["measurements"][1]["correct"] for w in ("dense", "pruned")
    )
    assert paired["first_only"] == sum(a > b for a, b in zip(dense, pruned, strict=True))
    page = report.to_html(record)
    assert page.count("<svg") == 4  # accuracy, channels, MRS, curves
    assert "http://" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    assert "<script" not in page
    path = save(result.model, tmp_path / "m.safetensors", record)
    _, again = robust_prune.models.open_model(path)
    assert again["plan"] == record["plan"]


def test_the_command_and_python_fine_tune_alike() -> None:
    from robust_prune.cli.compress import compress as command

    typed = {
        name: parameter.default
        for name, parameter in inspect.signature(command).parameters.items()
        if name in {f.name for f in dataclasses.fields(TrainingConfig)} and name != "epochs"
    }
    assert typed.pop("lr") is None  # by the network
    assert {"schedule", "ema", "attack_steps", "batch_size"} <= set(typed)
    plain = Settings(finetune="pgd-at", epochs=1)
    assert Settings(finetune="pgd-at", epochs=1, **typed).training() == plain.training()
    assert (plain.training().schedule, plain.training().ema) == ("constant", 0.999)
    other = Settings(finetune="pgd-at", epochs=1, schedule="cosine")
    assert (other.training().schedule, other.training().ema) == ("cosine", 0.999)


def test_names_of_before_still_work_and_warn() -> None:
    data = (torch.rand(24, 3, 32, 32), torch.arange(24) % 10)
    with pytest.warns(DeprecationWarning, match="'steps' is now 'prune_steps'"):
        result = compress(tiny_resnet(), data, prune_ratio=0.3, steps=1, allocation="uniform")
    assert result.report["settings"]["prune_steps"] == 1
    with pytest.warns(DeprecationWarning, match="'training_options' is now given by"):
        compress(tiny_resnet(), data, allocation="uniform", training_options={"ema": 0.5})
    with pytest.warns(DeprecationWarning, match="'method' is now 'estimator'"):
        assert sensitivity(tiny_resnet(), data, method="structural", n=8).method == "structural"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{}, {"prune_steps": 2}, {"protect": ["layer1.*"]}])
def test_the_result_shares_no_memory_with_the_model_given(
    options: dict[str, Any], layout: torch.memory_format
) -> None:
    """Until it is cut the copy lies where the model does."""
    model = tiny_resnet().to(memory_format=layout)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = compress(model, None, prune_ratio=0.3, calibration_images=4, **options)
    own = {t.untyped_storage().data_ptr() for t in result.model.state_dict().values()}
    assert not own & {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("norm", "asked", "rate"), [(True, None, 0.1), (False, None, 0.05), (False, 0.2, 0.2)]
)
def test_a_network_without_batch_norm_is_tuned_at_half_the_rate(
    norm: bool, asked: float | None, rate: float
) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=not norm),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    data = (torch.rand(40, 3, 8, 8), torch.arange(40) % 4)
    result = robust_prune.compress(
        net, data, prune_ratio=0.4, finetune="pgd-at", epochs=1, attack_steps=1, lr=asked
    )
    assert result.report["settings"]["lr"] == rate
    assert f"peak rate {rate:g}" in result.report["finetune"]["how"]
