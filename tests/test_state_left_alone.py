"""What a caller has set stays as it was after every public call, and after one that fails."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn

import robust_prune as rp
from robust_prune.adversaries import adversarial_set, autoattack, pgd
from robust_prune.data import as_split
from robust_prune.finetune import TrainingConfig, train_
from robust_prune.graph import ModelGraph
from robust_prune.types import ThreatModel
from tests.graph.test_graph import random_plan

SIZE = (3, 8, 8)
LINF = ThreatModel.linf("8/255")
IMAGES = torch.rand(48, *SIZE, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(48) % 4


class Boom(Exception):  # noqa: N818 - not one of ours
    pass


class Net(nn.Module):
    """A net in mixed modes with a frozen layer, a hook, and a pass that can be made to fail."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.out = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.1)
        self.passes_left = 10**9

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes_left -= 1
        if self.passes_left < 0:
            raise Boom
        x = self.second(self.norm(self.first(images)).relu()).relu()
        return self.out(self.drop(x.mean((2, 3))))


def a_net() -> Net:
    net = Net().train()
    net.norm.eval()
    net.out.eval()
    net.drop.eval()  # pgd attacks the model in the mode that it is in
    net.first.requires_grad_(False)
    net.second.register_forward_hook(lambda module, inputs, output: None)
    return net


def of_model(model: nn.Module) -> dict[str, Any]:
    """Modes, flags, hooks and gradients by name; weights of what must not change too."""
    hooks = [name for name in vars(nn.Module()) if "hooks" in name]
    return {
        "mode": {name: module.training for name, module in model.named_modules()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "grads": {name for name, p in model.named_parameters() if p.grad is not None},
        "hooks": {
            name: {hook: list(getattr(module, hook) or ()) for hook in hooks}
            for name, module in model.named_modules()
        },
        "own": {
            name: sorted(set(vars(module)) - {"passes_left"})
            for name, module in model.named_modules()
        },
    }


def of_weights(model: nn.Module) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in model.state_dict().items()}


def of_process() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "warnings": list(warnings.filters),
    }


def a_plan(net: nn.Module) -> rp.PruningPlan:
    return random_plan(ModelGraph(Net().eval(), SIZE), 0.5)


def prune_as_torch_pruning_does(net: nn.Module, folder: Path) -> None:
    importance = rp.MRSImportance(net, (IMAGES, LABELS), threat=LINF, steps=1, n=16)
    with rp.dependency_graph():
        tp.pruner.BasePruner(
            net, IMAGES[:1], importance=importance, pruning_ratio=0.5, ignored_layers=[net.out]
        )


def tune(net: nn.Module, folder: Path) -> None:
    config = TrainingConfig(
        "trades", epochs=1, threat=LINF, attack_steps=1, batch_size=16, validation_images=8
    )
    train_(net, as_split((IMAGES, LABELS)), as_split((IMAGES[:8], LABELS[:8])), config)


def compressed(net: nn.Module, folder: Path) -> None:
    rp.compress(
        net,
        (IMAGES, LABELS),
        threat=LINF,
        test=(IMAGES[:4], LABELS[:4]),
        prune_ratio=0.3,
        finetune="pgd-at",
        epochs=1,
        attack_steps=1,
        batch_size=16,
        evaluation="pgd",
        run_dir=folder / "run",
    )


def replayed(net: nn.Module, folder: Path) -> None:
    rp.compress(net, None, plan=a_plan(net), input_size=SIZE, reconstruct=False)


def pushed(net: nn.Module, folder: Path) -> None:
    with mock.patch("robust_prune.hub.upload", return_value="an address"):
        rp.push_to_hub(net, "me/net")


Call = Callable[[nn.Module, Path], object]
CALLS: dict[str, Call] = {
    "compress": compressed,
    "compress by a plan": replayed,
    "sensitivity": lambda net, _: rp.sensitivity(net, (IMAGES, LABELS), threat=LINF, n=8),
    "sensitivity by ascent": lambda net, _: rp.sensitivity(
        net, (IMAGES, LABELS), threat=LINF, n=8, estimator="ascent"
    ),
    "sensitivity by masking": lambda net, _: rp.sensitivity(
        net, (IMAGES, LABELS), threat=LINF, n=8, estimator="structural"
    ),
    "evaluate by PGD": lambda net, _: rp.evaluate(
        net, (IMAGES, LABELS), threat=LINF, attack="pgd", n=6
    ),
    "evaluate by AutoAttack": lambda net, _: rp.evaluate(
        net, (IMAGES, LABELS), threat=LINF, attack="autoattack", n=2
    ),
    "autoattack": lambda net, _: autoattack(net, IMAGES[:2], LABELS[:2], threat=LINF, seed=0),
    "adversarial_set": lambda net, _: adversarial_set(
        net, IMAGES[:4], LABELS[:4], threat=LINF, seed=0, batch_size=2
    ),
    "pgd": lambda net, _: pgd(
        net,
        IMAGES[:2],
        LABELS[:2],
        threat=LINF,
        steps=3,
        generator=torch.Generator().manual_seed(0),
    ),
    "export": lambda net, folder: rp.export(
        net, folder / "net.pt2", to="torch-export", input_size=SIZE
    ),
    "export_int8": lambda net, folder: rp.export_int8(
        net, folder / "net.onnx", IMAGES[:8], batches=(1,)
    ),
    "compare": lambda net, _: rp.compare(
        {"dense": net, "again": net}, (IMAGES, LABELS), threat=LINF, n=4, batches=(1,)
    ),
    "MRSImportance and dependency_graph": prune_as_torch_pruning_does,
    "ModelGraph": lambda net, _: ModelGraph(net, SIZE),
    "save": lambda net, folder: rp.save(net, folder / "net.safetensors"),
    "save and load": lambda net, folder: rp.load(
        rp.save(net, folder / "net.safetensors"), model=a_net()
    ),
    "save_pretrained and from_pretrained": lambda net, folder: rp.from_pretrained(
        rp.save_pretrained(net, folder / "hub"), model=a_net()
    ),
    "push_to_hub": pushed,
    "prune_": lambda net, _: rp.prune_(net, a_plan(net)),
    "train_": tune,
}
IN_PLACE = {"prune_": {"weights"}, "train_": {"weights", "mode"}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("passes", [None, 0, 1, 3, 7])
@pytest.mark.parametrize("name", list(CALLS))
def test_a_call_leaves_state_alone_also_where_it_fails(
    name: str, passes: int | None, tmp_path: Path
) -> None:
    net = a_net()
    for seeding in (torch.manual_seed, np.random.seed, random.seed):
        seeding(5)
    a_plan(net)  # what libraries set on their first use is theirs
    before = {**of_model(net), "weights": of_weights(net), **of_process()}
    if passes is not None:
        net.passes_left = passes
        with contextlib.suppress(Boom, rp.RobustPruneError, RuntimeError):
            CALLS[name](net, tmp_path)
    else:
        CALLS[name](net, tmp_path)
    after = {**of_model(net), "weights": of_weights(net), **of_process()}
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= IN_PLACE.get(name, set()), {
        key: (before[key], after[key]) for key in changed if key not in ("torch", "weights")
    }


def test_every_public_function_is_among_them() -> None:
    called = " ".join(CALLS)
    functions = {n for n in rp.__all__ if callable(getattr(rp, n)) and n[0].islower()}
    assert {n for n in functions - {"adapter"} if n not in called} == set()


FIRST_USE = """
import os, warnings
import robust_prune as rp
from robust_prune.adversaries import autoattack  # what imports do while they are imported
from robust_prune.data import open_data
environment, filters = dict(os.environ), list(warnings.filters)
import torch
net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3),
    torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
open_data("digits")
rp.compress(net, None, prune_ratio=0.3, input_size=(3, 16, 16))
assert dict(os.environ) == environment, set(os.environ) ^ set(environment)
assert warnings.filters == filters
"""


def test_what_is_imported_on_first_use_leaves_the_environment_alone() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
