"""Static INT8 quantisation after pruning, by ONNX Runtime, and what it does to robustness."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_prune import evaluation
from robust_prune.adversaries import autoattack, pgd_verdicts
from robust_prune.errors import ModelError, UsageError, first_line
from robust_prune.evaluation import PGD_STEPS, Attack, TestImages
from robust_prune.exporting import OnnxModel, export, quiet, require
from robust_prune.latency import Conditions, alternating
from robust_prune.modules import copied, predict
from robust_prune.statistics import Proportion
from robust_prune.types import Evaluation, Measurement, ThreatModel

# Everything in 8 bits is fastest. Where logits are then off by more than CLOSE, as with layer
# norms and softmax, only products are: convolutions, linear layers, matrix products.
# Processors without VNNI add two products in 16 bits, which saturate: weights then take 7 bits.
PRODUCTS = ("Conv", "Gemm", "MatMul")
KINDS: dict[str, tuple[tuple[str, ...] | None, bool]] = {  # operators, and whether in 7 bits
    "all operators": (None, False),
    "all operators, weights in 7 bits": (None, True),
    "products alone": (PRODUCTS, False),
    "products alone, weights in 7 bits": (PRODUCTS, True),
}
CLOSE = 0.1
BATCH = 32
LATENCY_BATCHES = (1, 16)


@dataclass(frozen=True)
class Quantised:
    """A quantised file, and what it came to before anybody attacked it.

    `error` is that of the logits on the calibration images, relative to how they spread over
    images; `agreement` the share of these images with the same class. `quantised` says whether all
    operators or the products alone have 8 bits, and weights 7. `latency_ms` has milliseconds by
    batch of the module (`torch`), of the float file (`onnx`) and of this one (`int8`), by turns.
    """

    path: Path
    images: int
    quantised: str
    error: float
    agreement: float
    bytes: int
    float_bytes: int
    threads: int
    latency_ms: Mapping[int, Mapping[str, float]] = field(default_factory=dict)


def export_int8(
    model: nn.Module,
    path: str | os.PathLike[str],
    images: Tensor,
    *,
    batches: Sequence[int] = LATENCY_BATCHES,
) -> Quantised:
    """Write a model with 8-bit weights and activations as an ONNX file.

    Weights are signed, with a scale for each output channel; activations unsigned, with the range
    that they have on `images`. The file takes and gives what `export`'s does. Processors with
    VNNI (or an equivalent) run it fast; on others products may saturate, so measure there.

    Args:
        model: takes images in [0, 1]; left as it was.
        path: of the file, written once it is whole.
        images: [N, C, H, W] in [0, 1], training images, to calibrate on.
        batches: sizes of batches to time; none for no timing.

    Raises:
        UsageError: a package is missing.
        ModelError: the model can't be exported or quantised.
    """
    require("onnx", "onnxscript", "onnxruntime")
    if len(images) == 0:
        raise UsageError("INT8 needs images to calibrate on")
    path, exact = Path(path), copied(model).cpu().float().eval()
    channels, height, width = images.shape[1:]
    try:
        drafts = tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-")
    except OSError as fault:
        raise ModelError(f"{path.parent}: can't write there: {fault.strerror}") from None
    with drafts as folder:
        whole = Path(folder) / "float.onnx"
        export(exact, whole, to="onnx", input_size=(channels, height, width))
        with quiet():
            draft, name, error, agreement = _closest(exact, whole, images.cpu(), Path(folder))
            times = _times(exact, whole, draft, images, batches)
        sizes = whole.stat().st_size, draft.stat().st_size
        draft.replace(path)
    return Quantised(
        path=path,
        images=len(images),
        quantised=name,
        error=error,
        agreement=agreement,
        bytes=sizes[1],
        float_bytes=sizes[0],
        threads=torch.get_num_threads(),
        latency_ms=times,
    )


def judge(
    model: nn.Module,
    quantised: nn.Module,
    test: TestImages,
    *,
    threat: ThreatModel,
    attack: Attack = "pgd",
    seed: int = 0,
    batch_size: int = 100,
    on_progress: Callable[[str], None] | None = None,
) -> tuple[Evaluation, Evaluation]:
    """Measure a model and its quantised version on the same images.

    The quantised one has no gradient, so that its attacks are the model's, and every verdict is its
    own. PGD: each iterate of the attack on the model is judged. AutoAttack: the images that
    AutoAttack made on the model are judged, and what they leave is attacked by Square directly,
    which needs no gradient. Both are upper bounds: an attack made for the quantised model alone may
    find more.

    Returns:
        What was measured of the model, and of the quantised version.
    """
    tell = on_progress or (lambda line: None)
    plain: Attack = "pgd" if attack == "autoattack" else attack
    of_model = evaluation.evaluate(
        model, test, threat=threat, attack=plain, seed=seed, batch_size=batch_size
    )
    start = time.perf_counter()
    right = predict(quantised, test.images, batch_size) == test.labels
    mine = [_measured("clean", right, start, {"verdicts": "its own"})]
    if attack != "none":
        tell(f"PGD-{PGD_STEPS} with the float model's gradients on {len(right)} images")
        start = time.perf_counter()
        held, _ = pgd_verdicts(
            model,
            test.images,
            test.labels,
            threat=threat,
            steps=PGD_STEPS,
            seed=seed,
            batch_size=batch_size,
            judge=quantised,
        )
        details = {
            "steps": PGD_STEPS,
            "gradients": "of the float model",
            "verdicts": "its own, on any iterate",
        }
        mine.append(_measured("pgd", held, start, details))
    if attack == "autoattack":
        theirs, own = _autoattacked(model, quantised, test, threat, seed, batch_size, tell)
        of_model = replace(of_model, measurements=(*of_model.measurements, theirs))
        mine.append(own)
    return of_model, replace(of_model, measurements=tuple(mine), cost=None, latency_ms=None)


def _autoattacked(
    model: nn.Module,
    quantised: nn.Module,
    test: TestImages,
    threat: ThreatModel,
    seed: int,
    batch_size: int,
    tell: Callable[[str], None],
) -> tuple[Measurement, Measurement]:
    """Attack the model, judge what comes back, and attack what is left without gradients."""
    start = time.perf_counter()
    images, labels = test.images, test.labels
    tell(f"AutoAttack on the float model, {len(labels)} images")
    more: dict[str, Any] = {"threat": threat, "seed": seed, "batch_size": batch_size}
    found = autoattack(model, images, labels, on_progress=tell, **more)
    theirs = _measured("autoattack", found.robust, start, {"version": "standard"}, found.flags)
    start = time.perf_counter()
    held = predict(quantised, images, batch_size) == labels
    held &= predict(quantised, found.images.cpu(), batch_size) == labels
    transferred, left = int(held.sum()), held.nonzero().squeeze(1)
    if len(left):
        tell(f"Square on the quantised model, {len(left)} images")
        square = autoattack(
            quantised, images[left], labels[left], stand_in=False, attacks=("square",), **more
        )
        held[left] = square.robust
    details = {
        "transferred": "the images of AutoAttack on the float model",
        "robust_after": {"transfer": transferred, "square": int(held.sum())},
        "verdicts": "its own",
    }
    return theirs, _measured("autoattack", held, start, details)


def _closest(
    model: nn.Module, whole: Path, images: Tensor, folder: Path
) -> tuple[Path, str, float, float]:
    """Quantise everything; weights in 7 bits, or products alone, where that is nearer by far.

    Returns:
        The file, what has 8 bits, and its error and agreement on the images.
    """
    with torch.no_grad():
        exact = torch.cat([model(part) for part in torch.split(images, BATCH)])
    found: list[tuple[Path, str, float, float]] = []
    for name, (kinds, reduced) in KINDS.items():
        draft = folder / f"{len(found)}.onnx"
        _quantise(whole, draft, images, kinds, reduced)
        runtime = OnnxModel(draft)
        logits = torch.cat([runtime(part) for part in torch.split(images, BATCH)])
        spread = (exact - exact.mean(0)).norm() if len(exact) > 1 else exact.norm()
        error = float((logits - exact).norm() / spread.clamp_min(1e-12))
        agreement = float((logits.argmax(1) == exact.argmax(1)).float().mean())
        found.append((draft, name, error, agreement))
        if error <= CLOSE:
            break
    return min(found, key=lambda one: one[2])


def _quantise(
    whole: Path, draft: Path, images: Tensor, kinds: Sequence[str] | None, reduced: bool
) -> None:
    """Write the quantised file, after folding what ONNX Runtime folds.

    Raises:
        ModelError: ONNX Runtime can't.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.parts = iter(torch.split(images, BATCH))

        def get_next(self) -> dict[str, Any] | None:
            part = next(self.parts, None)
            return None if part is None else {"images": part.numpy()}

    ready = draft.with_suffix(".ready")
    try:
        quant_pre_process(str(whole), str(ready))
        quantization.quantize_static(
            str(ready),
            str(draft),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            reduce_range=reduced,
            op_types_to_quantize=None if kinds is None else list(kinds),
        )
    except Exception as fault:
        raise ModelError(
            f"the model can't be quantised: {type(fault).__name__}: {first_line(fault)}"
        ) from fault


def _times(
    model: nn.Module, whole: Path, draft: Path, images: Tensor, batches: Sequence[int]
) -> dict[int, dict[str, float]]:
    threads = torch.get_num_threads()
    models = {"torch": model, "onnx": OnnxModel(whole, threads), "int8": OnnxModel(draft, threads)}
    found = {}
    for batch in batches:
        some = images.cpu()[torch.arange(batch) % len(images)]
        times = alternating(list(models.values()), some, Conditions(batch, threads, "float32", ""))
        found[batch] = dict(zip(models, times, strict=True))
    return found


def _measured(
    attack: str,
    right: Tensor,
    start: float,
    details: Mapping[str, Any],
    flags: Sequence[str] = (),
) -> Measurement:
    verdicts = tuple(bool(v) for v in right.tolist())
    return Measurement(
        attack=attack,
        accuracy=Proportion(sum(verdicts), len(verdicts)),
        correct=verdicts,
        details=details,
        flags=tuple(flags),
        seconds=time.perf_counter() - start,
    )
