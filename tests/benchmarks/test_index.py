"""The list of records, and how all suites are called."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from benchmarks.__main__ import LEVELS, SUITES, command
from benchmarks.index import RECORDS, commands, findings, index, relinked
from benchmarks.published import PAGES, PLACE, TABLES, filled


def test_the_page_is_what_the_records_say() -> None:
    page = (RECORDS.parent / "README.md").read_text(encoding="utf-8")
    assert page == index(RECORDS), "python -m benchmarks --index"
    for folder in RECORDS.iterdir():
        assert f"records/{folder.name}/README.md" in page


def test_tables_of_the_pages_are_what_the_records_say() -> None:
    named = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named += [match["name"] for match in PLACE.finditer(text)]
        assert text == filled(text), "python -m benchmarks --index"
        emptied = PLACE.sub(lambda m: f"{m[1]}{m[3]}", text)
        assert len(emptied) < len(text)
        assert filled(emptied) == text
    assert set(named) == set(TABLES)
    with pytest.raises(KeyError, match="nothing"):
        filled("<!-- table nothing: written from the records -->\n<!-- end -->")


@pytest.mark.parametrize(
    "path", sorted(RECORDS.parent.rglob("*.py")), ids=lambda p: str(p.relative_to(RECORDS.parent))
)
def test_every_benchmark_can_be_imported(path: Path) -> None:
    importlib.import_module(".".join(path.relative_to(RECORDS.parents[1]).with_suffix("").parts))


def test_commands_are_found_in_text_and_in_blocks() -> None:
    text = "# T\n\nBy `python -m benchmarks.a --out\nX`, or\n\n    python -m benchmarks.b --n 1\n"
    assert commands("r", text) == ["python -m benchmarks.b --n 1", "python -m benchmarks.a --out X"]
    with pytest.raises(ValueError, match="record r gives no command"):
        commands("r", "# T")


def test_findings_leave_out_what_files_hold() -> None:
    text = "- `cells`: lines\n- won by 3\n  points\n- lost\n"
    assert findings(text) == ["won by 3 points", "lost"]
    found = "\n## Findings\n\n- level\n"
    assert findings(text + found) == ["level"]
    assert findings(f"{text}{found}\n## Not covered\n\n- AutoAttack\n") == ["level"]


def test_links_of_the_page_lead_to_files() -> None:
    assert relinked("[a](../b/c.md#d) [e](f/) [g](https://h.org)", "r") == (
        "[a](records/b/c.md#d) [e](records/r/f) [g](https://h.org)"
    )
    page = (RECORDS.parent / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page)
    assert len(links) > 30
    assert [link for link in links if not (RECORDS.parent / link).exists()] == []


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_is_called_with_a_folder_of_its_own(suite: str, level: str) -> None:
    call = command(suite, level, Path("data"), Path("out"), 2)
    assert call[1:3] == ["-m", f"benchmarks.{suite}"]
    assert call[call.index("--out") + 1] == "out"
    asked = {"--data", "--root"} & set(call)
    assert bool(asked) == (suite == "matrix" or (suite == "criteria" and level != "smoke"))
