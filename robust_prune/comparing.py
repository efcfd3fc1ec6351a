"""Several models on the same images: security curves, accuracy against cost and time, examples."""

from __future__ import annotations

import base64
import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robust_prune import evaluation
from robust_prune.adversaries import pgd, pgd_correct
from robust_prune.errors import UsageError
from robust_prune.evaluation import (
    PGD_STEPS,
    Attack,
    TestImages,
    draw,
    drawn_from,
    evaluate_in_rounds,
    test_images,
    too_wide,
)
from robust_prune.graph import count_cost
from robust_prune.latency import alternating, conditions_of
from robust_prune.models import library_versions
from robust_prune.modules import device_of, evaluating, predict, requires_grad
from robust_prune.options import LatencyOptions
from robust_prune.statistics import Proportion
from robust_prune.types import Evaluation, ThreatModel, to_plain

SCHEMA = "robust-prune/comparison/1"
EPS_SHARES = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)  # of the threat's eps, along the security curve
BATCHES = (1, 16, 64)
EXAMPLES = 6
PAIRS = 7  # of timings, for each batch
LARGEST_SIDE = 224  # of a picture in the record

Progress = Callable[[str], None]


def compare(
    models: Mapping[str, nn.Module],
    data: Any,
    *,
    threat: ThreatModel | None = None,
    attack: Attack = "pgd",
    n: int | Literal["auto"] = 200,
    margin: float = 2.0,
    seed: int = 0,
    batches: Sequence[int] = BATCHES,
    timing: LatencyOptions | None = None,
    records: Mapping[str, Mapping[str, Any]] | None = None,
    data_name: str = "the caller's images",
    class_names: Sequence[str] | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure models on the same images and return what came out as plain data.

    Every model is attacked at several eps by PGD-20, which makes its security curve, by AutoAttack
    where `attack` says so, and timed by turns with the others. The first model is the one that the
    others are tested against, on the same images (McNemar).

    Args:
        models: by the names that they are shown with; two or more.
        data: test images, as `evaluate` takes them.
        threat: norm and eps; default Linf 8/255.
        attack: `none`, `pgd` or `autoattack`, as `evaluate` has it.
        n: images to draw; `auto` for 200 and then twice as many, until the drop of every model
            against the first, under the strongest attack, is known to within the margin.
        margin: percentage points, half of a 95 % interval.
        seed: of the draw and of every attack.
        batches: of the timings; none for no timing.
        timing: threads and number format.
        records: what the models' files say, by name; plans in it give the widths.
        data_name: what is said of the images.
        class_names: by label, where they are known.
        on_progress: called with a line now and then.
    """
    if not isinstance(models, Mapping) or len(models) < 2:
        raise UsageError("give two models or more to compare, by name: {name: model, ...}")
    tell, threat = on_progress or (lambda line: None), ThreatModel.checked(threat)
    first = next(iter(models))
    judge = functools.partial(_evaluate_all, models, threat, attack, seed, tell)
    if n == "auto":
        split, name, classes = drawn_from(models[first], data)
        evaluations = evaluate_in_rounds(
            split, judge, margin=margin, seed=seed, classes=classes, name=name
        )
        notes = [wide] if (wide := too_wide(evaluations, margin)) else []
        test = draw(split, evaluations[0].n, seed, name=name)
    else:
        test = test_images(models[first], data, n, seed)
        evaluations, notes = judge(test), []
    found = dict(zip(models, evaluations, strict=True))
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, model in models.items() if attack != "none" else ():
        tell(f"{name}: PGD-{PGD_STEPS} at several eps")
        curves[name] = security_curve(model, test, found[name], threat=threat, seed=seed)
    times = _times(models, test.images, batches, timing or LatencyOptions(), tell)
    rows = [
        {
            "name": name,
            "cost": to_plain(count_cost(model, _size(test))),
            "measurements": to_plain(found[name].measurements),
            "paired": {} if name == first else to_plain(found[first].compare(found[name])),
            "curve": curves.get(name, []),
            "latency_ms": {str(batch): ms[name] for batch, ms in times["ms"].items()},
            "widths": _widths((records or {}).get(name) or {}),
        }
        for name, model in models.items()
    ]
    shown = [] if attack == "none" else examples(models, test, threat, seed, class_names)
    return {
        "schema": SCHEMA,
        "data_name": data_name,
        "split": test.split,
        "n": len(test.labels),
        "seed": seed,
        "threat": to_plain(threat),
        "attack": attack,
        "margin": margin if n == "auto" else None,
        "notes": [*notes, *_assumed(records or {})],
        "timed": times["how"],
        "models": rows,
        "examples": shown,
        "versions": library_versions(),
    }


def _evaluate_all(
    models: Mapping[str, nn.Module],
    threat: ThreatModel,
    attack: Attack,
    seed: int,
    tell: Progress,
    test: TestImages,
) -> list[Evaluation]:
    """Attack every model on the same images."""
    found = []
    for name, model in models.items():
        tell(f"{name}: {attack} on {len(test.labels)} images")
        found.append(
            evaluation.evaluate(
                model, test, threat=threat, attack=attack, seed=seed, on_progress=tell
            )
        )
    return found


def security_curve(
    model: nn.Module, test: TestImages, measured: Evaluation, *, threat: ThreatModel, seed: int
) -> list[dict[str, Any]]:
    """Return accuracy under PGD-20 at rising eps, from none on; steps are a quarter of each eps.

    An attack that works brings any model to nothing when eps is large enough: a curve that levels
    off above chance speaks of masked gradients.
    Source: Biggio and Roli, "Wild patterns", Pattern Recognition 84, 2018 (security evaluation
    curves); Carlini et al., arXiv 1902.06705, on what large eps must do.
    """
    known = {0.0: measured.get("clean"), threat.eps: measured.get("pgd")}
    points = []
    for eps in (0.0, *(share * threat.eps for share in EPS_SHARES)):
        there = known.get(eps)
        if there is not None:
            accuracy = there.accuracy
        else:
            right = pgd_correct(
                model,
                test.images,
                test.labels,
                threat=ThreatModel(threat.norm, eps),
                steps=PGD_STEPS,
                seed=seed,
                batch_size=100,
            )
            accuracy = Proportion(int(right.sum()), len(right))
        points.append({"eps": eps, "accuracy": to_plain(accuracy)})
    return points


def examples(
    models: Mapping[str, nn.Module],
    test: TestImages,
    threat: ThreatModel,
    seed: int,
    class_names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Return a few images, each attacked on every model, with what the models say.

    The first ones are those that models disagree on; images that the first model has wrong without
    an attack come last.
    """
    images, labels = test.images[:200], test.labels[:200]
    clean = {name: predict(model, images, 100) for name, model in models.items()}
    attacked = {
        name: _attacked(model, images, labels, threat, seed) for name, model in models.items()
    }
    under = {name: predict(model, attacked[name], 100) for name, model in models.items()}
    first = next(iter(models))
    held = torch.stack([under[name] == labels for name in models]).sum(0)
    split = (held > 0) & (held < len(models))
    order = sorted(
        range(len(labels)),
        key=lambda i: (not bool(clean[first][i] == labels[i]), not bool(split[i]), i),
    )
    return [
        {
            "index": i,
            "label": _class(int(labels[i]), class_names),
            "image": _png(images[i]),
            "models": [
                {
                    "name": name,
                    "clean": _class(int(clean[name][i]), class_names),
                    "attacked": _class(int(under[name][i]), class_names),
                    "right": [bool(said[name][i] == labels[i]) for said in (clean, under)],
                    "image": _png(attacked[name][i]),
                }
                for name in models
            ],
        }
        for i in order[:EXAMPLES]
    ]


def _attacked(
    model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, seed: int
) -> Tensor:
    """Attack images by PGD-20 and return its last iterates."""
    device = device_of(model)
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model), requires_grad(model, False):
        parts = [
            pgd(
                model,
                some.to(device),
                theirs.to(device),
                threat=threat,
                steps=PGD_STEPS,
                generator=generator,
            ).cpu()
            for some, theirs in zip(torch.split(images, 100), torch.split(labels, 100), strict=True)
        ]
    return torch.cat(parts)


def _assumed(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what had to be assumed of models' files."""
    return [f"{name}: {line}" for name, r in records.items() for line in r.get("assumed", ())]


def _times(
    models: Mapping[str, nn.Module],
    images: Tensor,
    batches: Sequence[int],
    timing: LatencyOptions,
    tell: Progress,
) -> dict[str, Any]:
    """Time all models by turns at every batch."""
    if batches:
        tell("timing by turns")
    device = device_of(next(iter(models.values())))
    ms: dict[int, dict[str, float]] = {}
    how = ""
    for batch in batches:
        asked = LatencyOptions(
            latency_batch=batch,
            latency_threads=timing.latency_threads,
            latency_precision=timing.latency_precision,
        )
        conditions = conditions_of(asked, device)
        how = str(conditions).partition(", ")[2]
        some = images[torch.arange(batch) % len(images)].to(device)
        found = alternating(list(models.values()), some, conditions, PAIRS)
        ms[batch] = dict(zip(models, found, strict=True))
    return {"ms": ms, "how": how}


def _widths(record: Mapping[str, Any]) -> dict[str, list[int]] | None:
    """Return [dense, kept] channels by group, from a record's plan; None where there is none."""
    plan = record.get("plan")
    if not isinstance(plan, Mapping):
        return None
    return {g["name"]: [int(g["width"]), len(g["keep"])] for g in plan["groups"]}


def _size(test: TestImages) -> tuple[int, int, int]:
    channels, height, width = test.images.shape[1:]
    return channels, height, width


def _class(label: int, names: Sequence[str] | None) -> str:
    return str(names[label]) if names is not None and label < len(names) else str(label)


def _png(image: Tensor) -> str:
    """Return an image [C, H, W] in [0, 1] as PNG in base64, grey unless it has 3 channels."""
    from PIL import Image

    if len(image) not in (1, 3):
        image = image.mean(0, keepdim=True)
    pixels = (255 * image).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    scale = LARGEST_SIDE / max(picture.size)
    if scale < 1:
        picture = picture.resize(tuple(math.ceil(scale * side) for side in picture.size))  # type: ignore[arg-type]
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
