"""Half of the multiply-adds and INT8: time on resnet18, accuracy on a robust ResNet-10.

    python -m benchmarks.int8 --weights cifar10-resnet10-robust.pt --data cifar10 \
        --out benchmarks/records/<date>_int8

Time: timm's resnet18 with random weights at 224 x 224, which it does not depend on; dense and
half, as torch module, as ONNX file, and as INT8 file, all by turns. Accuracy: the ResNet-10 without
half of its multiply-adds, un-tuned, and its INT8 file, on the same test images.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import robust_prune
from benchmarks.runs import NETWORK, log_of
from robust_prune import evaluation
from robust_prune.data import open_data
from robust_prune.exporting import OnnxModel
from robust_prune.latency import Conditions, alternating
from robust_prune.models import build_model, open_model, resolve_spec
from robust_prune.quantising import judge
from robust_prune.types import ThreatModel, to_plain

SIZE = (3, 224, 224)
PAIRS = 20


def times(folder: Path, threads: int) -> list[dict[str, Any]]:
    """Time the six forms of resnet18 by turns, at batches of 1, 16 and 64."""
    torch.manual_seed(0)
    dense = build_model(resolve_spec("resnet18", {})).eval()
    half = robust_prune.compress(
        dense,
        None,
        prune_ratio=0.5,
        allocation="uniform",
        calibration_images=8,
        reconstruct=False,
        verify=False,
        input_size=SIZE,
    ).model
    forms: dict[str, Any] = {"dense torch": dense, "half torch": half}
    for name, model in (("dense", dense), ("half", half)):
        file = folder / f"{name}.onnx"
        robust_prune.export(model, file, to="onnx", input_size=SIZE)
        forms[f"{name} onnx"] = OnnxModel(file, threads)
        robust_prune.export_int8(model, folder / f"{name}-int8.onnx", torch.rand(32, *SIZE))
        forms[f"{name} int8"] = OnnxModel(folder / f"{name}-int8.onnx", threads)
    lines = []
    for batch in (1, 16, 64):
        conditions = Conditions(batch, threads, "float32", "")
        pairs = PAIRS if batch == 1 else max(3, PAIRS // 4)
        found = alternating(list(forms.values()), torch.rand(batch, *SIZE), conditions, pairs)
        ms = dict(zip(forms, found, strict=True))
        lines.append({"network": "resnet18", "batch": batch, "threads": threads, "ms": ms})
    return lines


def accuracy(weights: Path, data: Path, n: int, folder: Path) -> dict[str, Any]:
    """Measure half of the ResNet-10 and its INT8 file on the same test images."""
    model, _ = open_model(str(weights), **NETWORK)
    splits = open_data(str(data), input_size=(3, 32, 32))
    half = robust_prune.compress(model, splits, prune_ratio=0.5, seed=0).model
    images, _ = splits.train.take(512, 0)
    done = robust_prune.export_int8(half, folder / "resnet10-int8.onnx", images)
    assert splits.test is not None
    before, after = judge(
        half,
        OnnxModel(done.path),
        evaluation.draw(splits.test, n, 0),
        threat=ThreatModel.linf("8/255"),
    )
    return {
        "network": "resnet10",
        "n": n,
        "int8": {**to_plain(done), "path": done.path.name},
        "accuracy": {
            m.attack: {
                "float": to_plain(m),
                "int8": to_plain(own),
                "paired": to_plain(before.compare(after)[m.attack]),
            }
            for m, own in zip(before.measurements, after.measurements, strict=True)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as drafts,
        log_of(asked.out, threads=asked.threads, mode="w") as write,
    ):
        for line in times(Path(drafts), asked.threads):
            write(line)
            dense = line["ms"]["dense torch"]
            shares = {name: round(ms / dense, 3) for name, ms in line["ms"].items()}
            print(f"batch {line['batch']}: of dense torch ({dense:.1f} ms) {shares}", flush=True)
        line = accuracy(asked.weights, asked.data, asked.n, Path(drafts))
        write(line)
        for attack, found in line["accuracy"].items():
            print(
                f"{attack}: float {100 * found['float']['accuracy']['value']:.1f} %, INT8 "
                f"{100 * found['int8']['accuracy']['value']:.1f} %, p "
                f"{found['paired']['p_value']:.2g}"
            )


if __name__ == "__main__":
    main()
