"""`robust-prune export --int8`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from robust_prune.cli.opening import file_to_write, open_model, open_splits, threat_model
from robust_prune.cli.output import Output
from robust_prune.options import DataOptions, ModelOptions, QuantisingOptions, ThreatOptions

if TYPE_CHECKING:
    from torch import nn

    from robust_prune.data import DataSplits
    from robust_prune.quantising import Quantised
    from robust_prune.types import Evaluation, ThreatModel

SEED = 0  # of the draws and attacks
LOST = 0.02  # of an accuracy, which is noted


def export_int8(
    model: str,
    opening: ModelOptions,
    quantising: QuantisingOptions,
    data: DataOptions,
    threat: ThreatOptions,
    output: Output,
    out: Path | None,
    force: bool,
) -> None:
    """Quantise, write, and say what it came to."""
    from robust_prune import exporting
    from robust_prune import quantising as quantisation
    from robust_prune.data import stand_ins
    from robust_prune.models import image_size_of
    from robust_prune.types import to_plain

    threat_model(threat)  # what is typed is checked before anything is opened
    exporting.require("onnx", "onnxscript", "onnxruntime")
    path = file_to_write(out or Path(f"{Path(model).stem}-int8.onnx"), force)
    module, record = open_model(model, opening, output=output)
    splits = open_splits(module, record, data, opening.input_size)
    known = splits is not None
    if splits is None:
        size = image_size_of(module, opening.input_size)
        splits = stand_ins(module, size, quantising.int8_images, SEED)
        output.note("no data is known: calibrated on stand-in photographs, which --data replaces")
    images, _ = splits.train.take(
        min(quantising.int8_images, len(splits.train)), SEED, verdicts=False
    )
    output.line(f"INT8: calibrating on {len(images)} {_kind(splits)}")
    done = quantisation.export_int8(module, path, images)
    _show(output, done)
    judged = None
    if known and quantising.evaluation != "none":
        judged = _judged(module, done, splits, quantising, threat_model(threat, record), output)
    output.document(
        {
            **to_plain(done),
            "path": str(path),
            "float": judged and to_plain(judged[0]),
            "int8": judged and to_plain(judged[1]),
        }
    )


def _judged(
    module: nn.Module,
    done: Quantised,
    splits: DataSplits,
    quantising: QuantisingOptions,
    threat: ThreatModel,
    output: Output,
) -> tuple[Evaluation, Evaluation] | None:
    from robust_prune import evaluation
    from robust_prune.exporting import OnnxModel
    from robust_prune.quantising import judge

    if splits.test is None or not splits.labelled:
        output.note("accuracy was not measured: there are no labelled test images")
        return None
    test = evaluation.draw(splits.test, quantising.n_eval, SEED)
    before, after = judge(
        module,
        OnnxModel(done.path),
        test,
        threat=threat,
        attack=quantising.evaluation,
        seed=SEED,
        on_progress=lambda line: output.line(f"  {line}"),
    )
    paired = before.compare(after)
    output.table(
        f"{after.n} test images of {splits.name}, {threat}, seed {SEED}, 95 % Wilson intervals; "
        "INT8: its own verdicts on attacks with the float model's gradients",
        ("attack", "float", "INT8", "p"),
        [
            (m.attack, str(m.accuracy), str(own.accuracy), f"{paired[m.attack].p_value:.2g}")
            for m, own in zip(before.measurements, after.measurements, strict=True)
        ],
    )
    for m, own in zip(before.measurements, after.measurements, strict=True):
        if m.accuracy.value - own.accuracy.value > LOST:
            lost = 100 * (m.accuracy.value - own.accuracy.value)
            output.note(f"{m.attack}: INT8 loses {lost:.1f} percentage points")
    return before, after


def _show(output: Output, done: Quantised) -> None:
    """Print size, time and how near the logits are."""
    output.result(
        f"wrote {done.path}: {done.quantised} in 8 bits, {done.bytes / 1e6:.2f} MB (float "
        f"{done.float_bytes / 1e6:.2f} MB)"
    )
    output.result(
        f"on the {done.images} calibration images logits differ by {100 * done.error:.1f} % of "
        f"their spread, and {100 * done.agreement:.1f} % get the same class"
    )
    rows: list[Any] = [
        (
            str(batch),
            f"{ms['torch']:.2f}",
            f"{ms['onnx']:.2f}",
            f"{ms['int8']:.2f}",
            f"{ms['int8'] / ms['torch']:.2f}",
            f"{ms['int8'] / ms['onnx']:.2f}",
        )
        for batch, ms in done.latency_ms.items()
    ]
    output.table(
        f"Milliseconds by turns, {done.threads} thread{'s' * (done.threads > 1)} of this CPU",
        ("batch", "torch", "ONNX float", "ONNX INT8", "of torch", "of ONNX float"),
        rows,
    )


def _kind(splits: DataSplits) -> str:
    return {
        "training data": "training images",
        "own pictures": "of your own pictures",
        "stand-in photographs": "stand-in photographs",
    }[splits.origin]
