"""Ideas for a win that lasts: each fine-tuned as long as the plain way, and compared with it.

    python -m benchmarks.ideas --data DIR --out RECORD [--network plain] [--ratio 0.75]
    python -m benchmarks.ideas --data DIR --out RECORD --only pruned steps --seeds 0 1 2

`pruned` is what `compress` makes, fine-tuned by the matrix's recipe; `torch-pruning` is the L2 norm
in every layer on our graph, tuned alike. Every other idea changes one thing and sees as many
images. Every model is a file of OUT/models, and a run that stops is taken up where it was. The
dense model is the matrix's, kept in --cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.criteria.dense import digest
from benchmarks.criteria.protocol import percent, verdicts
from benchmarks.criteria.summary import interval_of, p_of, p_value
from benchmarks.ideas.trying import BASE, IDEAS, Subject
from benchmarks.matrix.levels import LONG
from benchmarks.matrix.one import open_one, parser_of
from robust_prune.files import write_text
from robust_prune.graph import count_cost


@dataclass(frozen=True)
class Found:
    """One model measured; verdicts are strings of 0 and 1, one per image."""

    name: str
    seed: int
    macs: int
    params: int
    dense: str
    validation: str
    clean: str
    pgd: str
    cpu_seconds: float

    @property
    def told(self) -> str:
        """One line for people."""
        return (
            f"{self.name}, seed {self.seed}: {self.macs / 1e6:.2f} M, {self.params:,} parameters, "
            f"clean {percent(self.clean):.1f}, PGD-20 {percent(self.pgd):.1f}, "
            f"{self.cpu_seconds:.0f} s"
        )


def measure(subject: Subject, name: str) -> Found:
    """Make the model of an idea, and attack it."""
    start = time.process_time()
    model = IDEAS[name](subject)
    seconds = time.process_time() - start
    splits, threat = subject.splits, subject.settings.threat
    assert splits.validation is not None
    assert splits.test is not None
    cost = count_cost(model, splits.input_size)
    on_test = verdicts(model, splits.test, subject.bench.level.test_images, threat, "pgd")
    return Found(
        name=name,
        seed=subject.key.seed,
        macs=cost.macs,
        params=cost.params,
        dense=digest(subject.dense),
        validation=verdicts(model, splits.validation, 2000, threat, "pgd")["pgd"],
        clean=on_test["clean"],
        pgd=on_test["pgd"],
        cpu_seconds=round(seconds, 1),
    )


def page(found: list[Found]) -> str:
    """Return Markdown: ideas by their gain over the plain way, over the seeds that both have."""
    lines = [
        "| idea | seeds | MACs (M) | parameters | CPU seconds | clean % | PGD-20 % "
        "| points over `pruned` | p |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = {f.seed: f for f in found if f.name == BASE}
    for name in [n for n in IDEAS if any(f.name == n for f in found)]:
        runs = [f for f in found if f.name == name]
        pairs = [
            tuple(int(a) - int(b) for a, b in zip(f.pgd, base[f.seed].pgd, strict=True))
            for f in runs
            if f.seed in base and name != BASE
        ]
        gain = f"{100 * statistics.mean(map(statistics.mean, pairs)):+.1f}" if pairs else ""
        lines.append(
            f"| {name} | {len(runs)} | {statistics.mean(f.macs for f in runs) / 1e6:.2f} "
            f"| {statistics.mean(f.params for f in runs):,.0f} "
            f"| {statistics.mean(f.cpu_seconds for f in runs):.0f} "
            f"| {interval_of([f.clean for f in runs])} | {interval_of([f.pgd for f in runs])} "
            f"| {gain} | {p_value(p_of(pairs)) if pairs else ''} |"
        )
    return "\n".join(lines) + "\n"


def open_subject(options: argparse.Namespace, seed: int) -> Subject:
    """Open data and dense model, with the epochs asked for."""
    one = open_one(options, seed)
    tuning = one.bench.level.tuning(LONG)
    if options.epochs is not None:
        tuning = replace(tuning, epochs=options.epochs)
    return Subject(**vars(one), tuning=tuning, record=options.shapes)


def main() -> None:
    """Measure the ideas that are missing, and write the page."""
    options = _options()
    out: Path = options.out or Path(tempfile.mkdtemp(prefix="ideas-"))
    (out / "models").mkdir(parents=True, exist_ok=True)
    for seed in () if options.summary else options.seeds:
        subject = open_subject(options, seed)
        subject.note(out, subject.tuning, level=options.level)
        for name in options.only or IDEAS:
            path = out / "models" / f"{name}-{seed}.json"
            if not path.exists():
                found = measure(subject, name)
                write_text(path, json.dumps(asdict(found)) + "\n")
                print(found.told, flush=True)
    paths = sorted((out / "models").glob("*.json"))
    text = page([Found(**json.loads(p.read_text(encoding="utf-8"))) for p in paths])
    write_text(out / "summary.md", text)
    print(text)


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--epochs", type=int, help="of fine-tuning, not the matrix's; 0 for none")
    parser.add_argument("--only", nargs="+", default=[], choices=IDEAS, metavar="IDEA")
    parser.add_argument("--shapes", type=Path, help="record of benchmarks.shapes, for `fitted`")
    return parser.parse_args()


if __name__ == "__main__":
    main()
