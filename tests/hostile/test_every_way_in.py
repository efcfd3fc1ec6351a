"""The same broken inputs by every command, and hostile values by every function of the API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robust_prune as rp
from robust_prune.errors import ModelError, RobustPruneError
from robust_prune.graph import ModelGraph
from robust_prune.modules import ImageModel
from tests.conftest import OwnNet, tiny_resnet
from tests.hostile.inputs import PICKLES, SAFETENSORS, nested
from tests.hostile.test_hostile import Refused, assert_one_line, refused  # noqa: F401 - a fixture

MODELS = {
    "an empty file": b"",
    "text": b"these are no weights\n",
    "an HTML page": b"<!DOCTYPE html><html><body>404</body></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "a pickle that runs something": PICKLES["os.system, protocol 2, in torch's zip"],
    "a header of a gigabyte": SAFETENSORS["a header of a gigabyte"],
    "JSON nested deep": nested(100_000),
}
COMMANDS = {
    "info": "info FILE --arch resnet18",
    "compress": "compress FILE --arch resnet18 --ratio 0.5",
    "sensitivity": "sensitivity FILE --arch resnet18",
    "evaluate": "evaluate FILE --arch resnet18 --data digits",
    "export": "export FILE --format onnx --arch resnet18",
    "export to INT8": "export FILE --format onnx --int8 --arch resnet18 --data digits",
    "compare": "compare FILE resnet18 --arch resnet18 --data digits",
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("command", list(COMMANDS))
def test_files_that_are_no_models(command: str, name: str, refused: Refused) -> None:  # noqa: F811
    for file in ("m.pt", "m.safetensors"):
        Path(file).write_bytes(MODELS[name])
        assert file in refused(3, *COMMANDS[command].replace("FILE", file).split())


@pytest.mark.parametrize("command", list(COMMANDS))
def test_paths_that_lead_nowhere(command: str, refused: Refused) -> None:  # noqa: F811
    Path("file").write_text("x")
    Path("loop").symlink_to("loop")
    for path in ("none.pt", "loop", "file/m.pt", "a" * 300, "none/\u202eno.pt"):
        # the name of what is written, which is looked at first, is too long too
        code = 1 if len(path) > 255 and command.startswith(("compress", "export")) else 3
        message = refused(code, *COMMANDS[command].replace("FILE", path).split())
        assert "\u202e" not in message, "it would turn the line around"


class Odd(nn.Module):
    """A network whose forward pass gives something else than logits."""

    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.out, self.give = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), give

    def forward(self, images: Tensor) -> Any:
        return self.give(self.out(torch.relu(self.stem(images)).mean((2, 3))))


ODD: dict[str, nn.Module] = {
    "NaN": Odd(lambda y: y * float("nan")),
    "infinities": Odd(lambda y: y / 0),
    "no gradient": Odd(lambda y: y.detach()),
    "classes": Odd(lambda y: y.argmax(1)),
    "one class": Odd(lambda y: y[:, :1]),
    "a map": Odd(lambda y: y[:, :, None, None].expand(-1, -1, 4, 4)),
    "one row": Odd(lambda y: y.mean(0)),
    "an empty tuple": Odd(lambda y: ()),
    "nothing": Odd(lambda y: None),
    "a text": Odd(lambda y: "logits"),
    "no parameters": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "whole numbers": Odd(lambda y: y.long()),
}


def images(n: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(torch.rand(n, 3, 12, 12), torch.arange(n) % 5)]


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "evaluate": lambda m: rp.evaluate(m, images(), attack="autoattack", n=8),
    "compress": lambda m: rp.compress(m, images(), calibration_images=4, prune_ratio=0.3),
}


@pytest.mark.parametrize("name", list(ODD))
@pytest.mark.parametrize("call", list(CALLS))
def test_networks_that_give_no_logits(call: str, name: str) -> None:
    with pytest.raises(RobustPruneError) as caught:
        CALLS[call](ODD[name].eval())
    assert_one_line(str(caught.value))


DATA_OF_OTHERS: dict[str, Tensor] = {
    "channels last": torch.rand(8, 12, 12, 3),
    "grey images": torch.rand(8, 1, 12, 12),
    "an alpha channel": torch.rand(8, 4, 12, 12),
}


TAKING: dict[str, Callable[[Any], Any]] = {
    "evaluate": lambda data: rp.evaluate(OwnNet().eval(), data, attack="pgd", n=8),
    "compress": lambda data: rp.compress(OwnNet().eval(), data, prune_ratio=0.3),
}


@pytest.mark.parametrize("name", list(DATA_OF_OTHERS))
@pytest.mark.parametrize("call", list(TAKING))
def test_images_that_the_network_does_not_take(call: str, name: str) -> None:
    with pytest.raises(
        RobustPruneError, match=r"the model does not take a .*x12.* image"
    ) as caught:
        TAKING[call]((DATA_OF_OTHERS[name], torch.arange(8) % 5))
    assert_one_line(str(caught.value))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("call", list(CALLS))
def test_weights_that_are_no_numbers_are_named(call: str, value: float) -> None:
    net = OwnNet().eval()
    name, parameter = list(net.named_parameters())[-1]
    parameter.data.view(-1)[0] = value
    with pytest.raises(ModelError, match=rf"hold NaN or infinity .{name}"):
        CALLS[call](net)


class Drops(OwnNet):
    def forward(self, images: Tensor) -> Tensor:
        return torch.nn.functional.dropout(super().forward(images), 0.5, training=True)


WITHOUT_GROUPS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a last layer alone": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 5)),
        r"no prunable group \(1: its channels are the model's outputs\)",
    ),
    "noise": (Drops, r"no prunable group \(.*differ from run to run.*; and . more, which"),
    "nothing": (lambda: nn.Sequential(nn.Flatten()), r"no prunable group \(no layers\)"),
    "lazy layers": (
        lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(5)),
        r"no shape yet \(0.weight, of a lazy layer\): run it once",
    ),
    "compiled": (lambda: torch.compile(OwnNet(), backend="eager"), "compiled by torch.compile"),
    "compiled inside": (
        lambda: nn.Sequential(torch.compile(OwnNet(), backend="eager"), nn.Identity()),
        "^0 is compiled by torch.compile",
    ),
    "compiled in place": (lambda: compiled_(OwnNet()), "^the network is compiled in place"),
}


def compiled_(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


@pytest.mark.parametrize("name", list(WITHOUT_GROUPS))
def test_where_nothing_can_be_pruned_it_is_said_why(name: str) -> None:
    make, message = WITHOUT_GROUPS[name]
    with pytest.raises(RobustPruneError, match=message) as caught:
        rp.compress(make().eval(), images(), calibration_images=4, prune_ratio=0.3)
    assert_one_line(str(caught.value))


def test_numbers_of_numpy_are_numbers() -> None:
    ratio, n = np.float32(0.3), np.int64(4)
    result = rp.compress(OwnNet().eval(), images(), calibration_images=n, prune_ratio=ratio)
    assert result.plan.budget.prune_ratio == pytest.approx(0.3)
    assert type(result.plan.budget.prune_ratio) is float


def squeezed(**options: Any) -> Any:
    return rp.compress(OwnNet().eval(), images(), calibration_images=4, **options)


VALUES: dict[str, Callable[[], Any]] = {
    "a ratio of NaN": lambda: squeezed(prune_ratio=float("nan")),
    "a ratio above one": lambda: squeezed(prune_ratio=1.5),
    "a ratio of text": lambda: squeezed(prune_ratio="half"),
    "a ratio of a list": lambda: squeezed(prune_ratio=[0.5]),
    "an unknown option": lambda: squeezed(prune_ratio=0.5, prune_ration=0.5),
    "an unknown target": lambda: squeezed(prune_ratio=0.5, target="watts"),
    "an unknown method": lambda: squeezed(prune_ratio=0.5, finetune="pgd-ta"),
    "an unknown score": lambda: squeezed(prune_ratio=0.5, score="l7"),
    "an unknown layer": lambda: squeezed(prune_ratio=0.5, protect=["layer9"]),
    "a pattern of nothing": lambda: squeezed(prune_ratio=0.5, ratio_of={"none.*": 0.5}),
    "images of no size": lambda: rp.compress(tiny_resnet(), None, input_size=(3, 0, 8)),
    "a negative radius": lambda: rp.ThreatModel.linf(-0.1),
    "a radius of NaN": lambda: rp.ThreatModel.l2(float("nan")),
    "a radius of text": lambda: rp.ThreatModel.linf("8/0"),
    "a norm of another kind": lambda: rp.ThreatModel("l1", 0.1),  # type: ignore[arg-type]
    "a budget of nothing": lambda: rp.Budget("macs", 0.0),
    "a budget in watts": lambda: rp.Budget("watts", 0.5),  # type: ignore[arg-type]
    "an attack of no name": lambda: rp.evaluate(OwnNet(), images(), attack="fab"),  # type: ignore[arg-type]
    "no images": lambda: rp.evaluate(OwnNet(), [], attack="none"),
    "a name to compress": lambda: rp.compress("resnet18", None),  # type: ignore[arg-type]
    "a name to evaluate": lambda: rp.evaluate("resnet18", images()),  # type: ignore[arg-type]
    "a name to measure": lambda: rp.sensitivity("resnet18", images()),  # type: ignore[arg-type]
    "a plan of text": lambda: rp.PruningPlan.from_json("[]"),
    "a plan nested deep": lambda: rp.PruningPlan.from_json(nested(100_000).decode()),
    "a file of a format that is none": lambda: rp.export(
        tiny_resnet(),
        "m.doc",
        to="doc",  # type: ignore[arg-type]
        input_size=(3, 32, 32),
    ),
    "a graph of images of too many channels": lambda: ModelGraph(OwnNet(), (4, 8, 8)),
}


@pytest.mark.parametrize("name", list(VALUES))
def test_values_that_the_api_refuses(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RobustPruneError) as caught:
        VALUES[name]()
    assert_one_line(str(caught.value))
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_refused_is_left_as_it_was() -> None:
    model: ImageModel = tiny_resnet().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RobustPruneError):
        rp.compress(model, images(), prune_ratio=2.0)
    assert model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
