"""Training: losses against their definitions, and a loop that learns, selects and restores."""

from __future__ import annotations

import copy
import math
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robust_prune.data import DataSplits, as_split
from robust_prune.distributed import Processes
from robust_prune.errors import TrainingError, UsageError
from robust_prune.files import read_state, write_state
from robust_prune.finetune import (
    Attack,
    EpochRecord,
    History,
    Progress,
    TrainingConfig,
    collapse,
    interruptions,
    no_less_robust,
    train_,
)
from robust_prune.finetune.preparing import prepare
from robust_prune.models import build_model, resolve_spec
from robust_prune.modules import ImageModel
from robust_prune.registry import METHODS
from robust_prune.types import ThreatModel
from tests.conftest import TINY, tiny_resnet


def small_digits_model(digits: DataSplits) -> ImageModel:
    mean, std = digits.statistics()
    spec = resolve_spec(
        "resnet18", {"num_classes": 10, "in_chans": 1, **TINY}, cifar_stem=True, mean=mean, std=std
    )
    torch.manual_seed(0)
    return build_model(spec)


ROBUST = ThreatModel.linf(0.06)


def tuned(model: nn.Module, digits: DataSplits, method: str, **more: object) -> nn.Module:
    settings = {"epochs": 2, "lr": 0.05, "threat": ROBUST, **more}
    config = TrainingConfig(
        method,
        attack_steps=2,
        batch_size=64,
        augment=False,
        **settings,  # type: ignore[arg-type]
    )
    model = copy.deepcopy(model)
    some = as_split(digits.train.take(768, 0))
    train_(model, some, digits.validation, config, teacher=TEACHER.get("model"))
    return model


TEACHER: dict[str, nn.Module] = {}


@pytest.fixture(scope="module")
def clean_start(digits: DataSplits) -> nn.Module:
    # a tiny eps, so that the epoch that is kept is the one that has learned most
    tiny = {"epochs": 4, "clean_epochs": 4, "lr": 0.1, "threat": ThreatModel.linf(1e-4)}
    start = tuned(small_digits_model(digits), digits, "pgd-at", **tiny)
    TEACHER["model"] = tuned(start, digits, "pgd-at", epochs=3)
    return start


def robust_loss(model: nn.Module, digits: DataSplits) -> float:
    assert digits.validation is not None
    images, labels = digits.validation.take(128, 0)
    moved = Attack(ROBUST, 10, torch.Generator().manual_seed(0))(model, images, labels)
    with torch.no_grad():
        return float(F.cross_entropy(model(moved), labels))


@pytest.mark.parametrize("method", [*METHODS, "trades+awp"])
def test_each_method_lowers_the_robust_loss_on_digits(
    method: str, digits: DataSplits, clean_start: nn.Module
) -> None:
    model = tuned(clean_start, digits, method)
    assert not model.training
    assert robust_loss(model, digits) < 0.8 * robust_loss(clean_start, digits)


def test_the_best_epoch_is_kept_and_the_last_is_not(digits: DataSplits) -> None:
    model = small_digits_model(digits)
    states, calls = [], []

    def method(m: nn.Module, images: torch.Tensor, labels: torch.Tensor, a: Attack) -> torch.Tensor:
        calls.append(1)
        loss = F.cross_entropy(m(images), labels)
        return loss if len(calls) <= 80 else -loss  # learns, then unlearns

    config = TrainingConfig(
        method,
        epochs=4,
        threat=ThreatModel.linf(0.02),
        batch_size=32,
        lr=0.05,
        warmup=0.0,
    )
    history = train_(
        model,
        digits.train,
        digits.validation,
        config,
        on_epoch=lambda e: states.append(copy.deepcopy(model.state_dict())),
    )
    assert history.best_epoch in (1, 2)
    robust = [e.robust for e in history.epochs]
    assert robust[history.best_epoch] == max(robust) > robust[-1]
    kept = states[history.best_epoch]
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_is_used_by_itself_where_it_is_native_and_said_to_be_emulated_elsewhere(
    native: bool, digits: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx512_bf16": native}
    )
    some = as_split(digits.train.take(8, 0))

    def how(**options: bool) -> str:
        config = TrainingConfig("pgd-at", 1, ROBUST, batch_size=8, attack_steps=1, **options)
        return prepare(small_digits_model(digits), some, some, config, None, Processes()).how

    assert ("batch norms in bfloat16" in how()) == native
    assert "training passes in float32" in how()
    assert "emulated" not in how()
    assert ("training passes in bfloat16 (emulated here" in how(amp=True)) != native


def test_noise_is_no_reason_to_give_up_epochs() -> None:
    peak = torch.arange(100) < 50
    worse = peak & (torch.arange(100) >= 2)  # right on 2 fewer, and on none that the peak is not
    assert not no_less_robust(worse, peak)  # 2 > sqrt(2)
    other = torch.roll(peak, 10)  # right on as many, 10 of them others
    assert no_less_robust(other, peak)
    assert no_less_robust(other & (torch.arange(100) >= 15), peak)  # 5 fewer: 5 = sqrt(15 + 10)
    assert not no_less_robust(other & (torch.arange(100) >= 16), peak)  # 6 > sqrt(16 + 10)
    assert no_less_robust(peak, worse)


def scripted(
    digits: DataSplits, monkeypatch: pytest.MonkeyPatch, right: list[list[int]]
) -> tuple[History, float]:
    """Run epochs whose verdicts are given; return what was told, and the step that was kept."""
    told = iter(right)

    def validate(model: nn.Module, images: torch.Tensor, *_: object, **__: object):
        verdicts = torch.zeros(len(images), dtype=torch.bool)
        verdicts[next(told)] = True
        robust = verdicts.float().mean().item()
        return EpochRecord(0, math.nan, clean=0.5, robust=robust, seconds=0.0), verdicts

    def method(m: nn.Module, images: torch.Tensor, labels: torch.Tensor, attack: Attack):
        return m.net.fc.bias[0]  # type: ignore[union-attr,index,return-value]

    monkeypatch.setattr("robust_prune.finetune.loop.validate", validate)
    model = small_digits_model(digits)
    start = model.net.fc.bias[0].item()
    n = len(digits.train)
    config = TrainingConfig(
        method, epochs=len(right) - 1, threat=ThreatModel.linf(0.06), batch_size=n, lr=1.0,
        momentum=0.0, schedule="constant", warmup=0.0, validation_images=40, weight_decay=0.0,
    )  # fmt: skip
    history = train_(model, digits.train, digits.validation, config)
    return history, start - model.net.fc.bias[0].item()  # 1 an epoch


@pytest.mark.parametrize(
    ("right", "kept"),
    [
        ([[0], [0, 1, 2], [0, 1, 3], [0, 1, 4]], 3),  # equal ones: the last
        ([[0], [0, 1, 2, 3, 4], [0, 1, 2, 3, 5, 6], [0, 1, 4, 7, 8]], 3),  # one fewer of nine
        ([[0], [0, 1, 2, 3], [0, 1]], 1),  # two fewer, and none won
        ([[0], [0, 1, 2, 3], [0, 1], [0, 1, 2, 5]], 3),  # fell, and came back
        ([[0, 1, 2], [0, 1, 3], [3, 4]], 0),  # the model as it came is left for better ones alone
        ([[0, 1], [0, 1, 2], [0, 1, 2], []], 2),
    ],
)
def test_the_last_epoch_that_is_not_less_robust_is_kept(
    digits: DataSplits, monkeypatch: pytest.MonkeyPatch, right: list[list[int]], kept: int
) -> None:
    history, step = scripted(digits, monkeypatch, right)
    assert history.best_epoch == kept
    assert step == pytest.approx(kept, abs=1e-5)


def test_a_run_repeats_for_a_seed_and_leaves_the_global_generator_alone(
    digits: DataSplits,
) -> None:
    config = TrainingConfig(
        "pgd-at", epochs=1, threat=ThreatModel.linf(0.06), attack_steps=2, seed=4
    )
    before = torch.get_rng_state()
    one, two = small_digits_model(digits), small_digits_model(digits)
    torch.set_rng_state(before)
    train_(one, digits.train, digits.validation, config)
    assert torch.equal(torch.get_rng_state(), before)
    train_(two, digits.train, digits.validation, config)
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


def test_ctrl_c_keeps_the_best_epoch_so_far(digits: DataSplits) -> None:
    model = small_digits_model(digits)

    def stop(progress: object) -> None:
        if progress.epoch == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    config = TrainingConfig("n-fgsm", epochs=5, threat=ThreatModel.linf(0.06), clean_epochs=5)
    history = train_(model, digits.train, digits.validation, config, on_progress=stop)
    assert history.interrupted
    assert len(history.epochs) == 2
    assert not model.training


def test_a_loss_that_is_not_finite_stops_with_the_weights_before_it(digits: DataSplits) -> None:
    model = small_digits_model(digits)
    before = copy.deepcopy(model.state_dict())

    def method(m: nn.Module, images: torch.Tensor, labels: torch.Tensor, a: Attack) -> torch.Tensor:
        return m(images).sum() * math.nan

    config = TrainingConfig(method, epochs=1, threat=ThreatModel.linf(0.06))
    with pytest.raises(TrainingError, match="lower learning rate"):
        train_(model, digits.train, digits.validation, config)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("given", [None, 0.5, torch.ones(3, requires_grad=True), torch.ones(())])
def test_a_method_that_gives_no_loss_is_told(digits: DataSplits, given: object) -> None:
    config = TrainingConfig(lambda *_: given, epochs=1, threat=ThreatModel.linf(0.06))
    with pytest.raises(TrainingError, match="must give the mean loss"):
        train_(small_digits_model(digits), digits.train, digits.validation, config)


def test_a_frozen_model_is_an_error(digits: DataSplits) -> None:
    model = small_digits_model(digits).requires_grad_(False)
    config = TrainingConfig("pgd-at", epochs=1, threat=ThreatModel.linf(0.06))
    with pytest.raises(TrainingError, match="frozen"):
        train_(model, digits.train, digits.validation, config)


def test_a_last_batch_of_one_image_is_no_problem() -> None:
    model = tiny_resnet()
    split = as_split((torch.rand(9, 3, 32, 32), torch.arange(9)))
    config = TrainingConfig("n-fgsm", epochs=1, threat=ThreatModel.linf("8/255"), batch_size=8)
    assert len(train_(model, split, split, config).epochs) == 2


def record(epoch: int, clean: float, robust: float, fgsm: float = math.nan) -> EpochRecord:
    return EpochRecord(epoch, 1.0, clean, robust, 0.0, single_step=fgsm)


def test_catastrophic_overfitting_is_told() -> None:
    good = [record(0, 0.3, 0.2), record(1, 0.5, 0.3), record(2, 0.55, 0.28)]

    def told(records: list[EpochRecord], **more: int) -> str:
        return str(collapse(records, TrainingConfig("n-fgsm", 9, ThreatModel.linf(0.1), **more)))

    assert told(good) == "None"
    broken = [*good, record(3, 0.8, 0.01)]
    assert "epoch 3: robust 30.0 -> 1.0 %" in told(broken)
    assert told(broken, clean_epochs=3) == "None"
    assert told(broken, eps_warmup=2) == "None"  # the epochs before had a smaller eps
    assert told([*good, record(3, 0.1, 0.1)]) == "None"  # everything broke: not this fault
    # a robust start that clean epochs have undone is no collapse of the epochs after them
    undone = [record(0, 0.5, 0.45), record(1, 0.7, 0.02), record(2, 0.7, 0.01)]
    assert told([*undone, record(3, 0.6, 0.21)], clean_epochs=2) == "None"
    # a narrow ResNet from scratch, attacked on batch statistics: only the training loss looks well
    losses = zip((2.26, 2.02, 1.83), (0.21, 0.19, 0.15), (0.131, 0.088, 0.025), strict=True)
    scratch = [EpochRecord(i, *figures, 0.0) for i, figures in enumerate(losses, 1)]
    assert "robust 13.1 -> 2.5 %" in told(scratch)
    # from scratch robustness never was there, but single steps do not fool the model
    assert "70.0 % robust to FGSM" in told([record(0, 0.1, 0), record(1, 0.8, 0, 0.7)])
    assert told([record(0, 0.1, 0.0), record(1, 0.5, 0.3, 0.35)]) == "None"


@pytest.mark.parametrize("on_collapse", ["switch", "stop", "continue"])
def test_a_collapse_is_treated_as_asked(
    digits: DataSplits, on_collapse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robust_prune.finetune import choosing

    model = small_digits_model(digits)
    told = iter([None, "catastrophic overfitting in epoch 2"])
    monkeypatch.setattr(choosing, "collapse", lambda records, clean: next(told, None))
    seen = []
    original = METHODS.find("pgd-at")
    monkeypatch.setitem(METHODS._functions, "pgd-at", lambda *a: seen.append(1) or original(*a))
    config = TrainingConfig(
        "n-fgsm",
        epochs=3,
        threat=ThreatModel.linf(0.06),
        attack_steps=1,
        validation_images=32,
        on_collapse=on_collapse,
    )
    history = train_(model, digits.train, digits.validation, config)
    assert len(history.epochs) == (3 if on_collapse == "stop" else 4)
    assert bool(seen) == (on_collapse == "switch")
    assert "epoch 2" in history.notes[0]
    assert not math.isnan(history.epochs[1].single_step)
    assert math.isnan(history.epochs[-1].single_step) == (on_collapse == "switch")


class Memory:
    """Saved states as files give them back, written at every chance."""

    def __init__(self, every_batch: bool = True) -> None:
        self.states: list[dict[str, object]] = []
        self.every_batch = every_batch
        self.first: dict[str, object] | None = None

    def load(self) -> dict[str, object] | None:
        return self.first

    def save(self, state: dict[str, object]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "s.safetensors"
            write_state(path, state)
            self.states.append(read_state(path))

    def due(self) -> bool:
        return self.every_batch


def test_a_run_goes_on_from_every_batch_bit_for_bit(digits: DataSplits) -> None:
    few = as_split(digits.train.take(96, 0))
    config = TrainingConfig(
        "n-fgsm+awp",
        epochs=2,
        threat=ThreatModel.linf(0.06),
        batch_size=32,
        ema=0.9,
        clip_grad=1.0,
        cutout=3,
        randaugment=True,
        optimizer="adamw",
        lr=0.01,
        validation_images=32,
    )
    whole, memory = small_digits_model(digits), Memory()
    history = train_(whole, few, digits.validation, config, saved=memory)
    assert len(memory.states) == 1 + 2 * (3 + 1)  # before, after each batch, after each epoch
    assert history.epochs[-1].loss > 0
    for state in memory.states:
        model, broken = small_digits_model(digits), Memory()
        broken.first = state
        torch.manual_seed(123)  # what another process has drawn does not matter
        again = train_(model, few, digits.validation, config, saved=broken)
        assert all(torch.equal(v, whole.state_dict()[k]) for k, v in model.state_dict().items())
        assert [(e.loss, e.clean, e.robust) for e in again.epochs[1:]] == [
            (e.loss, e.clean, e.robust) for e in history.epochs[1:]
        ]


def test_the_average_of_weights_is_validated_and_kept(digits: DataSplits) -> None:
    few = as_split(digits.train.take(64, 0))
    states: list[dict[str, torch.Tensor]] = []

    def method(m: nn.Module, images: torch.Tensor, labels: torch.Tensor, a: Attack) -> torch.Tensor:
        states.append(copy.deepcopy(m.state_dict()))
        return F.cross_entropy(m(images), labels)

    model = small_digits_model(digits)
    config = TrainingConfig(
        method, epochs=1, threat=ThreatModel.linf(0.001), batch_size=16, ema=0.5, lr=0.2,
        validation_images=32, warmup=0.0, schedule="constant",
    )  # fmt: skip
    memory = Memory(every_batch=False)
    train_(model, few, digits.validation, config, saved=memory)
    states.append(memory.states[-1]["model"])  # type: ignore[arg-type]
    expected = states[0]["net.conv1.0.weight"].clone()
    for step, state in enumerate(states[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * state["net.conv1.0.weight"]
    average = memory.states[-1]["average"]
    torch.testing.assert_close(average["net.conv1.0.weight"], expected)  # type: ignore[index]


def test_schedules_and_eps() -> None:
    def config(**more: object) -> TrainingConfig:
        return TrainingConfig("pgd-at", 4, ThreatModel.linf(0.1), lr=1.0, **more)  # type: ignore[arg-type]

    cycle = [config(warmup=0.25).lr_at(step, 8) for step in range(8)]
    assert cycle[:2] == [0.5, 1.0]
    assert cycle[2:] == sorted(cycle[2:], reverse=True)
    cosine = [config(schedule="cosine").lr_at(step, 8) for step in (0, 4, 8)]
    assert cosine == pytest.approx([1.0, 0.5, 0.0])
    constant = [config(schedule="constant", warmup=0.25).lr_at(step, 8) for step in range(8)]
    assert constant == [0.5] + [1.0] * 7
    eps = [config(eps_warmup=3, clean_epochs=1).threat_at(epoch).eps for epoch in range(2, 7)]
    assert eps == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert config().threat_at(1).eps == 0.1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "step"}, "one-cycle"),
        ({"on_collapse": "pray"}, "switch"),
        ({"attack_batchnorm": "both"}, "eval"),
        ({"ema": 1.0}, "0.999 is usual"),
        ({"patience": 0}, "1 or more"),
        ({"clip_grad": 0.0}, "positive"),
        ({"validation_images": 0}, "1 or more"),
        ({"label_smoothing": 1.0}, r"in \[0, 1\)"),
        ({"batch_size": 1}, "2 or more"),
    ],
)
def test_settings_that_can_not_be(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainingConfig("pgd-at", 1, ThreatModel.linf(0.1), **wrong)  # type: ignore[arg-type]


def test_what_needs_something_that_is_not_there(digits: DataSplits) -> None:
    threat = ThreatModel.linf(0.06)
    for config, message in (
        (TrainingConfig("rslad", 1, threat), "learns from the dense model"),
        (TrainingConfig("pgd-at", 1, threat, optimizer="none such"), "none such"),
        (TrainingConfig("pgd-at", 1, threat, channels_last=True), "for GPUs"),
    ):
        with pytest.raises(UsageError, match=message):
            train_(small_digits_model(digits), digits.train, digits.validation, config)


@pytest.mark.parametrize("warmup", [0, 1])
def test_patience_ends_a_run_early(digits: DataSplits, warmup: int) -> None:
    def method(m: nn.Module, images: torch.Tensor, labels: torch.Tensor, a: Attack) -> torch.Tensor:
        return F.cross_entropy(m(images), labels) * 0

    config = TrainingConfig(
        method, epochs=9, threat=ThreatModel.linf(0.06), patience=2, weight_decay=0.0,
        batch_size=256, validation_images=32, lr=1e-6, eps_warmup=warmup,
    )  # fmt: skip
    model = small_digits_model(digits)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    history = train_(model, digits.train, digits.validation, config)
    assert len(history.epochs) == 3 + warmup  # counted from the whole eps on
    assert "2 epochs without a more robust one" in history.notes[0]


def test_gradients_are_clipped(digits: DataSplits) -> None:
    def method(m: nn.Module, images: torch.Tensor, labels: torch.Tensor, a: Attack) -> torch.Tensor:
        return 1000 * F.cross_entropy(m(images), labels)

    few = as_split(digits.train.take(32, 0))
    model = small_digits_model(digits)
    before = copy.deepcopy(model)
    config = TrainingConfig(
        method, epochs=1, threat=ThreatModel.linf(0.001), clip_grad=0.5, lr=1.0, momentum=0.0,
        weight_decay=0.0, batch_size=32, schedule="constant", validation_images=16,
    )  # fmt: skip
    memory = Memory(every_batch=False)
    train_(model, few, digits.validation, config, saved=memory)
    trained = memory.states[-1]["model"]
    moved = sum(
        float((trained[name] - p).square().sum())  # type: ignore[index]
        for name, p in before.named_parameters()
    )
    assert math.sqrt(moved) == pytest.approx(0.5, rel=1e-3)


def test_ctrl_c_waits_for_the_batch_and_a_second_one_does_not() -> None:
    with interruptions() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_stopped_by_ctrl_c_goes_on_where_it_was(digits: DataSplits) -> None:
    few = as_split(digits.train.take(96, 0))
    config = TrainingConfig(
        "pgd-at", epochs=2, threat=ThreatModel.linf(0.06), attack_steps=1, batch_size=32,
        validation_images=32,
    )  # fmt: skip
    whole = small_digits_model(digits)
    train_(whole, few, digits.validation, config)
    model, memory = small_digits_model(digits), Memory(every_batch=False)

    def press(progress: Progress) -> None:
        if (progress.epoch, progress.images) == (1, 64):
            signal.raise_signal(signal.SIGINT)

    stopped = train_(model, few, digits.validation, config, saved=memory, on_progress=press)
    assert stopped.interrupted
    assert memory.states[-1]["batch"] == 3  # the batch in hand was finished and saved
    again, rest = small_digits_model(digits), Memory()
    rest.first = memory.states[-1]
    assert not train_(again, few, digits.validation, config, saved=rest).interrupted
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in again.state_dict().items())


DAMAGED: dict[str, dict[str, object]] = {
    "an epoch of text": {"epoch": "1"},
    "an epoch of -5": {"epoch": -5},
    "an epoch beyond the last": {"epoch": 9},
    "a batch of -1": {"batch": -1},
    "an unknown field": {"code": "import os"},
    "no epochs": {"records": []},
    "an epoch out of order": {"best_epoch": 3},
    "verdicts as text": {"peak": "1111"},
    "too few verdicts": {"peak": torch.zeros(1, dtype=torch.bool)},
    "an average that was not asked for": {"average": {}},
    "no weights": {"model": {}},
    "weights as text": {"best": {"net.fc.weight": "x"}},
    "no settings of the optimizer": {"optimizer": {"state": {}, "param_groups": []}},
    "no generators": {"random": {}},
    "a broken generator": {"random": {"python": (3, (1, 2), None), "numpy": [], "torch": 5}},
}


SHORT = TrainingConfig(
    "pgd-at", epochs=2, threat=ROBUST, attack_steps=1, batch_size=32, validation_images=16
)


@pytest.fixture(scope="module")
def kept_state(digits: DataSplits) -> dict[str, object]:
    memory = Memory()
    short = replace(SHORT, epochs=1)
    train_(
        small_digits_model(digits),
        as_split(digits.train.take(32, 0)),
        digits.validation,
        short,
        saved=memory,
    )
    return memory.states[0]


@pytest.mark.parametrize("name", list(DAMAGED))
def test_a_saved_state_is_checked_before_it_is_taken_up(
    name: str, digits: DataSplits, kept_state: dict[str, object]
) -> None:
    few, memory = as_split(digits.train.take(32, 0)), Memory()
    memory.first = {**kept_state, **DAMAGED[name]}
    with pytest.raises(TrainingError, match="the saved state does not fit this run") as told:
        train_(small_digits_model(digits), few, digits.validation, SHORT, saved=memory)
    assert "\n" not in str(told.value)
