"""Images per second of adversarial training, beside a textbook loop with torchattacks.

    pip install --no-deps --target PEERS torchattacks
    python -m benchmarks.throughput --peers PEERS [--weights FILE] [--data DIR] [--out DIR]

PEERS is a folder outside this one: torchattacks' wheel brings a `robustbench` that would overwrite
the real one. Both loops run in this process on one thread, in turns, so that whatever else the
machine does hits both; a ratio is the median over rounds of the two times of the same round. The
network is the small ResNet of the criteria benchmark; speed does not depend on the weights, so
random ones do. Attacks of our loop are in bfloat16 where the processor has it; another row has
them in float32. The ratios for layouts are from a child process, as torch's channels_last kernels
can corrupt memory on a CPU (not with the widths here).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.adversaries import Folded
from robust_prune.data import open_data
from robust_prune.finetune import BETA, Attack, TrainingConfig, attacks_in_bfloat16
from robust_prune.models import build_model, library_versions, resolve_spec
from robust_prune.modules import ImageModel
from robust_prune.opening import load
from robust_prune.pipeline import hardware
from robust_prune.registry import METHODS
from robust_prune.types import ThreatModel

BATCH = 128
THREAT = ThreatModel.linf("8/255")
STEP_SIZE = 2 / 255
ROUNDS = {2: 7, 3: 7, 10: 5}  # attack steps: rounds, after one round that does not count
LIMIT = 1.3
NETWORK = {
    "num_classes": 10,
    "layers": [1, 1, 1, 1],
    "channels": [16, 32, 64, 128],
    "stem_type": "deep",
    "stem_width": 8,
}
WIDE = {**NETWORK, "channels": [32, 64, 128, 256], "stem_width": 16}
NORMALISATION: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}

DEFAULT = "ours"  # attacks in bfloat16 where the processor computes in it

Step = Callable[[], None]


def peer(folder: Path | None) -> Any:
    """Import torchattacks, last on the path so that nothing it brings hides another package."""
    if folder is not None:
        sys.path.append(str(folder))
    try:
        import torchattacks
    except ImportError as error:
        raise SystemExit(
            f"{error}; get torchattacks by `pip install --no-deps --target PEERS torchattacks` "
            "(and requests, tqdm if they are what is missing), then add --peers PEERS"
        ) from None
    return torchattacks


def build(weights: Path | None, kwargs: dict[str, Any] = NETWORK) -> ImageModel:
    """Build a network on [0, 1] images, from a state_dict if there is one."""
    if weights is not None:
        model = load(
            weights, arch="resnet18", model_kwargs=kwargs, cifar_stem=True, **NORMALISATION
        )
        assert isinstance(model, ImageModel)
        return model
    return build_model(resolve_spec("resnet18", kwargs, cifar_stem=True, **NORMALISATION))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)


def textbook(attacks: Any, method: str, model: nn.Module, steps: int, batch: Any) -> Step:
    """One step as tutorials write it: train mode, attack, loss, backward, SGD."""
    images, labels = batch
    settings = {"eps": THREAT.eps, "alpha": STEP_SIZE, "steps": steps}
    attack = (
        attacks.PGD(model, random_start=True, **settings)
        if method == "pgd-at"
        else attacks.TPGD(model, **settings)
    )
    optimizer = sgd(model)

    def step() -> None:
        model.train()
        adversarial = attack(images, labels)
        optimizer.zero_grad()
        if method == "pgd-at":
            loss = F.cross_entropy(model(adversarial), labels)
        else:
            logits = model(images)
            divergence = F.kl_div(
                F.log_softmax(model(adversarial), 1), F.softmax(logits, 1), reduction="batchmean"
            )
            loss = F.cross_entropy(logits, labels) + BETA * divergence
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def ours(
    method: str,
    model: nn.Module,
    steps: int,
    batch: Any,
    *,
    fold: bool = True,
    bfloat16: bool = False,
    amp: bool = False,
) -> Step:
    """One step as the training loop does it: `bfloat16` for attacks, `amp` for everything."""
    images, labels = batch
    folded = Folded.of(model, images) if fold else None
    assert (folded is not None) == fold
    generator = torch.Generator().manual_seed(0)
    attack = Attack(THREAT, steps, generator, folded=folded, bfloat16=bfloat16)
    optimizer = sgd(model.train())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = METHODS.find(method)(model, images, labels, attack)
        loss.backward()
        optimizer.step()

    return step


def strength(weights: Path | None, batch: Any, steps: int = 10) -> dict[str, float]:
    """Mean cross-entropy, in float32, of PGD images made in float32 and in bfloat16."""
    images, labels = batch
    model = build(weights).eval()
    folded = Folded.of(model, images)
    found = {}
    for name, bfloat16 in (("float32", False), ("bfloat16", True)):
        generator = torch.Generator().manual_seed(0)
        attack = Attack(THREAT, steps, generator, folded=folded, bfloat16=bfloat16)
        moved = attack(model, images, labels)
        with torch.no_grad():
            found[name] = float(F.cross_entropy(model(moved), labels))
    return found


def in_turns(arms: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm, round by round; the order turns around every round."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name in list(arms) if number % 2 else list(reversed(arms)):
            start = time.perf_counter()
            arms[name]()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compared(seconds: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Medians, quartiles, and how many times faster than `base` in the median round."""
    found: dict[str, Any] = {}
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        ratios = [b / t for b, t in zip(seconds[base], times, strict=True)]
        found[name] = {
            "images_per_second": BATCH / middle,
            "seconds_median": middle,
            "seconds_quartiles": [low, high],
            "seconds_best": min(times),
            "speedup_median": statistics.median(ratios),
            "speedup_range": [min(ratios), max(ratios)],
            "speedup_of_best": min(seconds[base]) / min(times),
        }
    return found


def layouts() -> dict[str, Any]:
    """The wide network, PGD-2 without folding, in both layouts."""
    torch.manual_seed(0)
    batch = torch.rand(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    models = {"contiguous": build(None, WIDE), "channels_last": build(None, WIDE)}
    models["channels_last"].to(memory_format=torch.channels_last)
    narrowest = min(
        m.in_channels
        for m in models["contiguous"].modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride == (2, 2)
    )
    assert narrowest >= 8, "torch's backward pass corrupts the heap in narrower layers"
    arms = {name: ours("pgd-at", model, 2, batch, fold=False) for name, model in models.items()}
    return compared(in_turns(arms, 5), "contiguous")


def child_layouts() -> dict[str, Any]:
    """Run `layouts` where a crash takes nothing else along."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.throughput", "--layouts"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.returncode}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def line(title: str, found: dict[str, Any]) -> str:
    times = found["seconds_quartiles"]
    low, high = found["speedup_range"]
    return (
        f"{title:34}{found['images_per_second']:7.1f} images/s  {found['seconds_median']:6.3f} s "
        f"[{times[0]:.3f}, {times[1]:.3f}]  x {found['speedup_median']:.2f} [{low:.2f}, {high:.2f}]"
        f"  best x {found['speedup_of_best']:.2f}"
    )


def taken(data: str | None) -> tuple[Tensor, Tensor]:
    """One batch in memory: training images of `data`, else noise."""
    if data is None:
        return torch.rand(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    return open_data(data).train.take(BATCH, 0)


def measure(attacks: Any, weights: Path | None, batch: Any, tell: Callable[[str], None]) -> Any:
    """All methods and step counts: textbook, our loop as it is, and with parts of it left out."""
    found: dict[str, Any] = {}
    config = TrainingConfig("pgd-at", 1, THREAT)
    native = attacks_in_bfloat16(config, torch.device("cpu"))
    for method in ("pgd-at", "trades"):
        for steps, rounds in ROUNDS.items():
            arms = {
                "textbook": textbook(attacks, method, build(weights), steps, batch),
                DEFAULT: ours(method, build(weights), steps, batch, bfloat16=native),
                "ours, float32": ours(method, build(weights), steps, batch),
                "ours, float32, not folded": ours(method, build(weights), steps, batch, fold=False),
                "ours, --amp": ours(method, build(weights), steps, batch, bfloat16=True, amp=True),
            }
            compare = compared(in_turns(arms, rounds), "textbook")
            found[f"{method}, {steps} steps"] = compare
            for name, figures in compare.items():
                tell(line(f"{method:7}{steps:3} steps  {name}", figures))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, help="state_dict of the network; random if none")
    parser.add_argument("--data", help="folder of images; noise if none")
    parser.add_argument("--peers", type=Path, help="folder that torchattacks is installed in")
    parser.add_argument("--out", type=Path, help="folder to write the record to")
    parser.add_argument("--layouts", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.layouts:
        print(json.dumps(layouts()))
        return
    attacks = peer(asked.peers)
    torch.manual_seed(0)
    batch = taken(asked.data)
    lines: list[str] = []

    def tell(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    record: dict[str, Any] = {
        "settings": {
            "threads": 1,
            "batch_size": BATCH,
            "threat": str(THREAT),
            "rounds": ROUNDS,
            "network": NETWORK,
            "weights": asked.weights.name if asked.weights else "random",
            "images": Path(asked.data).name if asked.data else "noise",
        },
        "versions": {**library_versions(), "torchattacks": attacks.__version__},
        "hardware": hardware(torch.device("cpu")),
    }
    tell(json.dumps(record))
    record["attack_loss"] = strength(asked.weights, batch)
    tell(f"loss of PGD-10 images: {record['attack_loss']}")
    record["training"] = measure(attacks, asked.weights, batch, tell)
    record["layouts"] = child_layouts()
    for name, figures in record["layouts"].items():
        tell(line(f"wide, not folded, {name}", figures) if isinstance(figures, dict) else name)
    slowest = min(found[DEFAULT]["speedup_median"] for found in record["training"].values())
    tell(f"least speedup of our loop: {slowest:.2f} (limit {LIMIT})")
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        (asked.out / "log.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
