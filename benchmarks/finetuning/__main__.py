"""Which fine-tuning is best after pruning 75 % of the multiply-adds, and what pruning then wins.

    python -m benchmarks.finetuning --data DIR [--warm DIR] --out RECORD --stage methods
    python -m benchmarks.finetuning --data DIR [--warm DIR] --out RECORD --stage final \
        [--arms ARM,ARM] [--seeds 0,1] [--blocks 2]
    python -m benchmarks.finetuning --data DIR [--warm DIR] --out RECORD --stage reach \
        [--ratios 0.85,0.9]

Stage `methods` tunes one pruned model in many ways; the one with the best robustness on validation
images goes on to `final`, where it meets torch-pruning's best arm and the dense model. `reach` asks
how much can go before robust accuracy is a point below the dense model's: both ways of pruning, the
same fine-tuning, and the models that `final` has measured beside those of --ratios. A run that
stops is taken up where it was: every model measured is a line of OUT/cells.jsonl, every 250 images
of AutoAttack a line of OUT/autoattack.jsonl. More --blocks or --seeds add to what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.criteria.dense import CACHE, check_same, dense_model
from benchmarks.criteria.levels import CPU
from benchmarks.criteria.protocol import ARMS, Bench
from benchmarks.finetuning import protocol, summary
from benchmarks.finetuning.recipes import RECIPES
from robust_prune.data import open_data
from robust_prune.models import library_versions
from robust_prune.pipeline import hardware

NETWORK = "resnet10"


def main() -> None:
    """Run a stage, or what is left of it, and print the tables."""
    options = _options()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.data:
        _run(options, out)
    cells = protocol.attacked(protocol.read(out), protocol.read_blocks(out))
    text = summary.tables(cells)
    (out / "summary.md").write_text(text)
    print(text)


def _run(options: argparse.Namespace, out: Path) -> None:
    log = (out / "log.txt").open("a")

    def tell(line: str) -> None:
        for stream in (sys.stdout, log):
            print(line, file=stream, flush=True)

    network = next(n for n in CPU.networks if n.name == NETWORK)
    splits = open_data(options.data, input_size=CPU.size)
    model, trained = dense_model(
        network, splits, CPU.threat, options.cache, options.warm, "cpu", tell
    )
    path = out / "settings.json"
    check_same(path, network.name, trained["digest"])
    settings = {
        "threat": str(CPU.threat),
        "ratio": protocol.RATIO,
        "recipes": {
            name: {**asdict(recipe), "method": getattr(recipe.method, "__name__", recipe.method)}
            for name, recipe in RECIPES.items()
        },
        "test_images": protocol.TEST_IMAGES,
        "calibration_images": CPU.calibration_images,
        "batch_size": CPU.batch_size,
        "versions": library_versions(),
        "hardware": hardware(torch.device("cpu")),
        "dense": {network.name: trained},
    }
    path.write_text(json.dumps(settings, indent=1) + "\n")
    bench = Bench(network.name, model, splits, CPU.threat, CPU.calibration_images, CPU.batch_size)
    arms = options.arms or protocol.arms_of(options.stage, protocol.read(out))
    unknown = [arm for arm in arms if not protocol.is_arm(arm)]
    if unknown:
        raise SystemExit(
            f"no arm is named {unknown[0]!r}; it must be PRUNING/RECIPE, with one of "
            f"{', '.join(ARMS)} and one of {', '.join((protocol.NO_TUNING, *RECIPES))}"
        )
    blocks = options.blocks if options.stage == protocol.FINAL else 0
    ratios = options.ratios if options.stage == protocol.REACH else [protocol.RATIO]
    for ratio in ratios:
        shop = protocol.Workshop(bench, network, options.cache / "finetuning", ratio)
        protocol.run(shop, options.stage, arms, options.seeds, blocks, out, tell)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="image folder; without it only the tables are written anew")
    parser.add_argument("--warm", type=Path, help="folder of weights to start training from")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where models are kept")
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument(
        "--stage",
        choices=(protocol.METHODS, protocol.FINAL, protocol.REACH),
        default=protocol.METHODS,
    )
    parser.add_argument(
        "--ratios",
        type=lambda text: [float(r) for r in text.split(",")],
        default=[0.85, 0.9],
        help="shares of the multiply-adds removed in stage reach",
    )
    parser.add_argument(
        "--arms",
        type=lambda text: text.split(","),
        help="PRUNING/RECIPE; default all of the stage, in order of importance",
    )
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0])
    parser.add_argument("--blocks", type=int, default=2, help="of 250 images under AutoAttack")
    return parser.parse_args()


if __name__ == "__main__":
    main()
