"""Tables of the README and of the docs, written from the records.

A page has `<!-- table NAME: written from the records -->` above a table and `<!-- end -->` below
it; `python -m benchmarks --index` puts in between what the records say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.criteria import protocol as criteria
from benchmarks.criteria.estimators import correlations
from benchmarks.criteria.protocol import BEST, Cell
from benchmarks.criteria.summary import accuracy, best_peer, by_arm, p_value, params, spread
from benchmarks.finetuning import protocol as finetuning
from benchmarks.index import RECORDS
from benchmarks.matrix import cells as matrix
from benchmarks.matrix.levels import CAPACITY, DENSE, OURS
from benchmarks.matrix.summary import arms_of, comparisons, holm

ROOT = RECORDS.parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
PLACE = re.compile(
    r"(<!-- table (?P<name>[\w-]+): written from the records -->\n).*?(<!-- end -->)", re.DOTALL
)
CRITERIA, TUNING = RECORDS / "2026-11-23_criteria", RECORDS / "2026-11-24_finetuning"
PLAIN = RECORDS / "2026-11-26_matrix"
NAMES = {
    "resnet10": "ResNet-10",
    "vgg13": "VGG-13",
    "mobilevit": "MobileViT xxs",
    "tp-l2-local": "L2, local",
    "tp-l2-global": "L2, global",
    "tp-group-norm": "group norm",
    "tp-bn-scale": "BN scale",
    "tp-taylor-adversarial": "Taylor, adversarial",
    BEST: "`compress`",
    CAPACITY: "`--allocation capacity`",
    DENSE: "dense",
}
SHOWN = (
    ("resnet10", 0.5),
    ("resnet10", 0.75),
    ("vgg13", 0.5),
    ("vgg13", 0.75),
    ("mobilevit", 0.75),
)
OUR_TUNING = "pgd-at-averaged"
TEXTBOOKS = {"textbook": "0.02", "textbook-lr0.1": "0.1"}  # and their peak rates


def filled(page: str) -> str:
    """Return a page with its tables as the records have them.

    Raises:
        KeyError: the page asks for a table that is not known.
    """
    return PLACE.sub(lambda m: f"{m[1]}\n{TABLES[m['name']]()}\n{m[3]}", page)


def untuned() -> str:
    """Return robust accuracy before fine-tuning, by network and share removed."""
    rows = []
    for network, ratio in SHOWN:
        cells = criteria.read(CRITERIA / f"cells-{network}.jsonl")
        mine = [c for c in cells if c.stage == "untuned" and not c.error]
        arms = by_arm([c for c in mine if c.ratio == ratio])
        peer = best_peer(arms, "pgd")
        rows.append(
            (
                f"{NAMES[network]}, {100 * ratio:.0f} %",
                spread([c for c in mine if c.arm == DENSE], "pgd"),
                f"{spread(arms[peer], 'pgd')} ({NAMES[peer]})",
                f"**{spread(arms[BEST], 'pgd')}**",
                f"{params(arms[peer])}, {params(arms[BEST])}",
            )
        )
    return _table(
        (
            "network, multiply-adds removed",
            "dense",
            "best torch-pruning criterion",
            "`compress`",
            "parameters, theirs and ours",
        ),
        rows,
    )


def tuned() -> str:
    """Return robust accuracy after five epochs, by share removed."""
    cells = [c for c in finetuning.read(TUNING) if c.stage in ("final", "reach") and not c.error]
    rows = []
    for ratio in sorted({c.ratio for c in cells if c.ratio}):
        arms = by_arm([c for c in cells if c.ratio == ratio])
        peers = [arm for arm in arms if arm.startswith("tp-") and arm.endswith(f"/{OUR_TUNING}")]
        peers.sort(key=lambda arm: -accuracy(arms[arm], "pgd"))
        rows.append(
            (
                f"{100 * ratio:.0f} %",
                _seeds(arms[f"{BEST}/{OUR_TUNING}"]),
                "; ".join(f"{NAMES[arm.split('/')[0]]} {_seeds(arms[arm])}" for arm in peers),
                "; ".join(
                    f"at {rate}: {_seeds(arms[arm])}"
                    for name, rate in TEXTBOOKS.items()
                    if (arm := f"tp-bn-scale/{name}") in arms
                ),
            )
        )
    head = (
        "multiply-adds removed",
        "`compress` (seeds), parameters",
        "torch-pruning's criteria with our fine-tuning (seeds), parameters",
        "BN scale with a textbook loop in the same time, by peak rate",
    )
    return _table(head, rows)


def plain() -> str:
    """Return robust accuracy of the network without batch norm after twelve epochs."""
    found = {
        arm: [c for c in matrix.read(PLAIN) if c.key.arm == arm and c.key.tuning == "long"]
        for arm in (OURS, CAPACITY, "tp-l2-local")
    }
    head = [f"torch-pruning, {NAMES[a]}" if a.startswith("tp-") else NAMES[a] for a in found]
    return _table(head, [[spread(_as_cells(runs), "pgd") for runs in found.values()]])


def of_matrix(record: Path) -> str:
    """Return ours against torch-pruning's best arm, block by block, by the hardest attack."""
    cells = [c for c in matrix.read(record) if not c.error]
    all_found = comparisons(cells, OURS, CAPACITY)
    rows = []
    for found, corrected in zip(all_found, holm([c.p for c in all_found]), strict=True):
        if found.ours != OURS:
            continue
        _, _, _, ratio, tuning = found.block
        arms = {arm: _as_cells(runs) for arm, runs in arms_of(cells, found.block).items()}
        attack = {"pgd": "PGD-20", "autoattack": "AutoAttack"}[found.attack]
        ours = spread(arms[OURS], found.attack)
        rows.append(
            (
                f"{100 * ratio:.0f} %, {tuning}",
                attack,
                spread(arms.get(DENSE, []), found.attack),
                f"{spread(arms[found.theirs], found.attack)} ({NAMES[found.theirs]})",
                f"**{ours}**" if found.gain > 0 else ours,
                f"{found.gain:+.1f}, {p_value(corrected)}",
            )
        )
    head = (
        "removed, fine-tuning",
        "attack",
        "dense",
        "torch-pruning's best arm",
        "`compress`",
        "points, p after Holm",
    )
    return _table(head, rows)


def estimators() -> str:
    """Return how MRS goes with what pruning costs, by network."""
    pairs = [("measured", name) for name in ("ascent", "first-order", "structural")]
    rows = []
    for network in ("mobilevit", "resnet10", "vgg13"):
        groups, found = correlations(
            CRITERIA / f"estimators-{network}.json", (*pairs, ("ascent", "first-order"))
        )
        values = (f"{value:.2f}".replace("-", "\N{MINUS SIGN}") for value in found)
        rows.append((NAMES[network], str(groups), *values))
    head = ("network", "groups", "ascent", "first-order", "structural", "ascent with first-order")
    return _table(head, rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "untuned": untuned,
    "tuned": tuned,
    "plain": plain,
    "tiny-imagenet": partial(of_matrix, RECORDS / "2026-11-26_matrix-tiny-imagenet"),
    "cifar100": partial(of_matrix, RECORDS / "2026-11-27_matrix-cifar100"),
    "vgg": partial(of_matrix, RECORDS / "2026-11-27_matrix-vgg"),
    "mobilevit": partial(of_matrix, RECORDS / "2026-11-27_matrix-mobilevit"),
    "estimators": estimators,
}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _seeds(runs: Sequence[Cell]) -> str:
    return f"{spread(runs, 'pgd')} ({len(runs)}), {params(runs)}"


def _as_cells(runs: Sequence[matrix.Cell]) -> list[Cell]:
    """Return cells of the matrix as those of the criteria benchmark, which tables are made of."""
    return [
        Cell(
            *(c.key.network, c.key.tuning, c.key.arm, c.key.ratio, c.key.seed, c.macs, c.params),
            *(c.clean, c.pgd, c.autoattack),
        )
        for c in runs
    ]
