"""The scripts of examples/ run to their end, and the notebook cell by cell."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = {
    "quickstart": "of the multiply-adds are gone",
    "inside_torch_pruning": "step 2: 0.",
    "own_network": "is back from its file, bit for bit",
    "own_method": "margin-and-teacher+awp: clean",
    "own_attention": "heads are",
}


def test_all_examples_are_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    assert all(f"{{{{ example {name}.py }}}}" in page for name in SCRIPTS)


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_a_script_runs_by_itself_and_says_what_came_out(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert SCRIPTS[name] in done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_script_is_short_and_says_what_it_shows(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 75


def test_the_notebook_runs_and_shows_what_its_cells_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "cifar_shaped.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        stored = "".join("".join(output.get("text", ())) for output in cell["outputs"])
        assert len(printed.getvalue().splitlines()) == len(stored.splitlines()), number
    assert names["result"].plan.reached == pytest.approx(0.5, abs=0.01)
