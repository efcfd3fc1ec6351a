"""What widths decide: one network in many shapes of one cost, all tuned alike.

    python -m benchmarks.shapes --data DIR --out RECORD [--network plain] [--ratio 0.75]

Shapes come from the rules of allocation, from log-capacity weighted by MRS in several ways, and at
random; all have L2 scores, reconstruction, and the fine-tuning of the matrix. Every shape is a
file of OUT/shapes, and a run that stops is taken up where it was; --seeds makes more of the
same shapes. What is chosen among shapes is chosen on validation images; test images are attacked
beside them. The dense model is the matrix's, kept in --cache.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.criteria.protocol import verdicts
from benchmarks.matrix.levels import DENSE, LONG
from benchmarks.matrix.one import Grounds, One, open_one, parser_of
from benchmarks.matrix.work import tune_
from benchmarks.shapes.drawing import Evidence, shapes
from benchmarks.shapes.telling import Shape, page, read
from robust_prune.adversaries import adversarial_loss, adversarial_set
from robust_prune.allocation import log_capacity
from robust_prune.criteria import sensitivities
from robust_prune.files import write_text
from robust_prune.graph import ModelGraph
from robust_prune.modules import copied
from robust_prune.types import PruningPlan

VALIDATION_IMAGES = 2000


def plans(one: One, grounds: Grounds, drawn: int) -> dict[str, PruningPlan]:
    """Return the plan of every shape."""
    problem, attacked = grounds.problem, grounds.attacked
    told = sensitivities(one.dense, attacked, groups=tuple(problem.groups))
    found = shapes(problem, Evidence(told, grounds.curves), drawn)
    return {name: grounds.plan(widths, name) for name, widths in found.items()}


def measure(one: One, name: str, plan: PruningPlan | None) -> Shape:
    """Prune to a plan, or take the dense model, tune and attack it."""
    bench, splits, threat = one.bench, one.splits, one.settings.threat
    key = one.key.with_arm(DENSE if plan is None else name)
    model = copied(one.dense) if plan is None else one.by_plan(plan)
    assert splits.validation is not None
    assert splits.test is not None
    images, labels = splits.validation.take(512, 0)
    broken = adversarial_set(model, images, labels, threat=threat, steps=10, seed=0)
    before = verdicts(model, splits.validation, VALIDATION_IMAGES, threat, "pgd")["pgd"]
    loss = adversarial_loss(model, broken)
    tuned = tune_(bench, key, bench.level.tuning(LONG), model, splits)
    graph = ModelGraph(model, splits.input_size, probe=False)
    layers = graph.layers({})
    on_test = verdicts(model, splits.test, bench.level.test_images, threat, "pgd")
    return Shape(
        name=name,
        seed=key.seed,
        widths={g.name: g.width for g in graph.groups},
        layers=dict(layers),
        macs=graph.cost({}).macs,
        params=graph.cost({}).params,
        log_capacity=log_capacity(layers),
        loss=loss,
        before=before,
        validation=verdicts(model, splits.validation, VALIDATION_IMAGES, threat, "pgd")["pgd"],
        clean=on_test["clean"],
        pgd=on_test["pgd"],
        best_epoch=tuned.best_epoch,
        notes=tuned.notes,
    )


def main() -> None:
    """Measure the shapes that are missing, and write the page."""
    options = _options()
    out: Path = options.out or Path(tempfile.mkdtemp(prefix="shapes-"))
    (out / "shapes").mkdir(parents=True, exist_ok=True)
    if not options.summary:
        for seed in options.seeds:
            one = open_one(options, seed)
            one.note(out, one.bench.level.tuning(LONG), level=options.level, drawn=options.drawn)
            for name, plan in [(DENSE, None), *plans(one, one.grounds(), options.drawn).items()]:
                path = out / "shapes" / f"{name}-{seed}.json"
                if path.exists() or (options.only and name not in options.only):
                    continue
                shape = measure(one, name, plan)
                write_text(path, json.dumps(asdict(shape)) + "\n")
                print(f"{path.stem}: {shape.told}", flush=True)
    text = page(read(out), out)
    write_text(out / "summary.md", text)
    print(text)


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--drawn", type=int, default=16, help="shapes at random")
    parser.add_argument("--only", nargs="+", default=[], metavar="SHAPE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
