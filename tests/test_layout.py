"""The import rules that keep data flowing one way, and the doors that rooms go through."""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import robust_prune

ROOT = Path(robust_prune.__file__).parent
# A room is a folder or a file of the package. Lower ones never import higher ones.
ORDER = (
    "_version",
    "errors",
    "stopping",
    "untrusted",
    "statistics",
    "types",
    "user_code",
    "registry",
    "options",
    "files",
    "distributed",
    "modules",
    "models",
    "data",
    "adversaries",
    "graph",
    "latency",
    "costs",
    "opening",
    "repair",
    "criteria",
    "allocation",
    "importance",
    "evaluation",
    "comparing",
    "finetune",
    "report",
    "exporting",
    "quantising",
    "hub",
    "pipeline",
    "cli",
    "__main__",
)
WITHOUT_TORCH = {
    "errors",
    "stopping",
    "untrusted",
    "statistics",
    "types",
    "options",
    "registry",
    "allocation.problem",
    "allocation.widths",
    "allocation.plan",
    "report",
}
NEVER_ONE_ANOTHER = {"models", "data", "adversaries", "graph"}
ONE_IMPORTER = {
    "torch_pruning": {"graph", "importance"},
    "timm": {"models", "finetune", "data"},
    "pyautoattack": {"adversaries"},
    "typer": {"cli"},
    "rich": {"cli"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "markupsafe": {"report"},
    "safetensors": {"files", "models"},
    "msgspec": {"untrusted", "types", "models", "finetune", "report", "pipeline"},
    "filelock": {"files"},
    "huggingface_hub": {"models"},
    "accelerate": {"distributed"},
    "datasets": {"data"},
    "sklearn": {"data"},
    "torchvision": {"models", "data"},
}
LONGEST_FILE, LONGEST_FUNCTION = 330, 50
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def name_of(path: Path) -> str:
    """The dotted name of a file below the package; a room's door is named as the room."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in FILES}
ROOMS = {name_of(path) for path in FILES if path.name == "__init__.py"}


def listed(room: str) -> set[str]:
    """What a room's door lets through."""
    tree = ast.parse((ROOT / room.replace(".", "/") / "__init__.py").read_text())
    names = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return set(ast.literal_eval(names))


DOORS = {f"robust_prune.{room}": listed(room) for room in ROOMS - {"cli"}}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, `a.b` for `from a import b` where that is a module.

    A method, or an attack, has the name of its file, and the door lets the function through.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                module = full.removeprefix("robust_prune.") in NAMES
                yield (
                    full if module and alias.name not in DOORS.get(node.module, ()) else node.module
                )


@functools.cache
def local() -> tuple[tuple[str, str], ...]:
    """Every (importing file, imported file or door) inside the package."""
    return tuple(
        (name_of(path), name.removeprefix("robust_prune."))
        for path in FILES
        for name in imports(path)
        if name.startswith("robust_prune.")
    )


def top(name: str) -> str:
    return name.partition(".")[0]


def test_every_room_is_in_the_picture() -> None:
    assert {top(name) for name in NAMES} == set(ORDER)


def test_data_flows_down_the_list() -> None:
    pairs = {(top(a), top(b)) for a, b in local()}
    assert not {(a, b) for a, b in pairs if ORDER.index(b) > ORDER.index(a)}
    assert len(pairs) > 60


def test_rooms_go_through_doors() -> None:
    """A foreign room is imported by its folder's name, never by a file inside."""
    assert not {(a, b) for a, b in local() if top(a) != top(b) and "." in b}
    for room in ROOMS - {"cli"}:
        inside = {(a, b) for a, b in local() if a.startswith(f"{room}.") and b == room}
        assert not inside, "files of a room import one another, not their own door"


def test_no_files_import_one_another_in_a_circle() -> None:
    wanted: dict[str, set[str]] = {name: set() for name in NAMES}
    for a, b in local():
        wanted[a].add(b)
    while ready := {name for name, needs in wanted.items() if not needs}:
        wanted = {name: needs - ready for name, needs in wanted.items() if name not in ready}
    assert not wanted


def test_some_files_know_no_torch() -> None:
    for path in FILES:
        name = name_of(path)
        if name in WITHOUT_TORCH or top(name) in WITHOUT_TORCH:
            assert not [n for n in imports(path) if top(n) in ("torch", "torchvision", "timm")], (
                name
            )


def test_models_data_graph_and_adversaries_never_import_one_another() -> None:
    pairs = {(top(a), top(b)) for a, b in local()}
    assert not {(a, b) for a, b in pairs if a != b and {a, b} <= NEVER_ONE_ANOTHER}


def test_only_the_command_line_imports_the_pipeline() -> None:
    assert {top(a) for a, b in local() if top(b) == "pipeline"} == {"pipeline", "cli"}
    assert {top(a) for a, b in local() if top(b) == "cli"} == {"cli", "__main__"}


@pytest.mark.parametrize("third_party", list(ONE_IMPORTER))
def test_each_third_party_has_its_importer(third_party: str) -> None:
    users = {top(name_of(path)) for path in FILES for n in imports(path) if top(n) == third_party}
    assert users == ONE_IMPORTER[third_party]


@pytest.mark.parametrize("room", sorted(ROOMS - {"cli"}))
def test_a_door_lists_what_it_lets_through(room: str) -> None:
    tree = ast.parse((ROOT / room.replace(".", "/") / "__init__.py").read_text())
    later = [node for part in tree.body if isinstance(part, ast.If) for node in part.body]
    let_through = {
        alias.asname or alias.name
        for node in (*tree.body, *later)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("robust_prune.")
        for alias in node.names
    }
    assert listed(room) == let_through
    door = importlib.import_module(f"robust_prune.{room}")
    assert all(hasattr(door, name) for name in let_through)


def test_files_and_functions_stay_short() -> None:
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= LONGEST_FILE, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body:
                    length = (body[-1].end_lineno or 0) - body[0].lineno + 1
                    assert length <= LONGEST_FUNCTION, (path, node.name, length)
