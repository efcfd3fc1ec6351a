"""The import rules that keep data flowing one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import robust_prune

ROOT = Path(robust_prune.__file__).parent
# Lower files never import higher ones.
ORDER = [
    "_version",
    "errors",
    "imports",
    "proportions",
    "types",
    "distributed",
    "modules",
    "checkpoint",
    "runs",
    "resize",
    "builders",
    "models",
    "datasets",
    "augmentation",
    "data",
    "adversaries",
    "tracing",
    "costs",
    "wiring",
    "masking",
    "probing",
    "graph",
    "verify",
    "calibration",
    "reconstruction",
    "mrs",
    "scores",
    "curves",
    "allocation",
    "search",
    "importance",
    "evaluation",
    "finetune",
    "report",
    "exporting",
    "settings",
    "journal",
    "planning",
    "record",
    "stations",
    "pipeline",
    "cli",
    "__main__",
]
NOTHING_LOCAL = {"errors": set(), "types": {"errors", "proportions"}}
NEVER_ONE_ANOTHER = {"models", "builders", "data", "datasets", "costs", "graph", "adversaries"}
SAME_STATION = {("models", "builders"), ("data", "datasets"), ("graph", "costs")}
ONE_IMPORTER = {
    "torch_pruning": {"importance"},
    "timm": {"builders", "finetune"},
    "pyautoattack": {"adversaries"},
    "typer": {"cli"},
    "rich": {"cli"},
    "matplotlib": {"report"},
    "safetensors": {"checkpoint"},
    "accelerate": {"distributed"},
    "sklearn": {"datasets"},
    "torchvision": {"augmentation", "builders", "datasets"},
}


def imports() -> list[tuple[str, str]]:
    """Every (part of the package, imported module)."""
    found = []
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found += [(part, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found += [(part, name) for name in names]
    return found


def local() -> set[tuple[str, str]]:
    """Every (importing part, imported part) inside the package."""
    pairs = set()
    for part, name in imports():
        pieces = name.split(".")
        if pieces[0] == "robust_prune" and len(pieces) > 1 and pieces[1] in ORDER:
            pairs.add((part, pieces[1]))
    return {(a, b) for a, b in pairs if a != b}


def test_every_file_is_in_the_picture() -> None:
    parts = {p.name.removesuffix(".py") for p in ROOT.iterdir() if not p.name.startswith("__pyc")}
    assert parts - {"__init__", "py.typed"} == set(ORDER)


def test_data_flows_down_the_list() -> None:
    wrong = {(a, b) for a, b in local() if ORDER.index(b) > ORDER.index(a)}
    assert not wrong
    assert len(local()) > 30


@pytest.mark.parametrize("part", list(NOTHING_LOCAL))
def test_types_and_errors_stand_alone(part: str) -> None:
    assert {b for a, b in local() if a == part} <= NOTHING_LOCAL[part]


def test_types_and_allocation_know_no_torch() -> None:
    for part, name in imports():
        if part in ("types", "proportions", "errors", "allocation"):
            assert not name.startswith("torch"), (part, name)


def test_models_data_graph_and_adversaries_never_import_one_another() -> None:
    assert not {(a, b) for a, b in local() if {a, b} <= NEVER_ONE_ANOTHER} - SAME_STATION


def test_only_the_command_line_imports_the_pipeline() -> None:
    assert {a for a, b in local() if b == "pipeline"} == {"cli"}
    assert {a for a, b in local() if b == "cli"} <= {"__main__"}


@pytest.mark.parametrize("third_party", list(ONE_IMPORTER))
def test_each_third_party_has_its_importer(third_party: str) -> None:
    users = {part for part, name in imports() if name.split(".")[0] == third_party}
    assert users == ONE_IMPORTER[third_party]


def test_files_and_functions_stay_short() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 470, path
