"""What mkdocs fills in when it builds the pages: commands, options, registries, examples.

A page asks for a piece by a line such as `{{ command compress }}`. Files from outside this folder
that pages link to, such as the benchmark records, are added under their own paths.
"""

from __future__ import annotations

import ast
import enum
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from robust_prune import options, registry
from robust_prune.cli import app

ROOT = Path(__file__).parents[1]
PIECE = re.compile(r"^\{\{ (\w+) (\S+) \}\}$", re.MULTILINE)
OUTSIDE = ("CONTRIBUTING.md", "RELEASING.md", "CHANGELOG.md", "benchmarks/LOG.md")
RECORDS = ("benchmarks/records/*/*", "benchmarks/records/*/*/*.md")
SHOWN = (".md", ".png", ".json", ".jsonl", ".txt")


def command(name: str) -> str:
    """Return a command's help and options, by panel, as Markdown."""
    group: Any = typer.main.get_command(app)
    found = group.commands[name]
    panels: dict[str, list[Any]] = {}
    for parameter in found.params:
        panels.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(
            parameter
        )
    arguments = [p for p in found.params if p.param_type_name == "argument"]
    usage = " ".join(p.metavar or p.name.upper() for p in arguments)
    lines = [f"```\nrobust-prune {name} {usage} [OPTIONS]\n```", "", found.help or "", ""]
    for panel, parameters in panels.items():
        lines += [f"**{panel}**", "", "| option | default | |", "|---|---|---|"]
        lines += [_row(parameter) for parameter in parameters]
        lines.append("")
    return "\n".join(lines)


def _row(parameter: Any) -> str:
    named = [*parameter.opts, *parameter.secondary_opts]
    if parameter.param_type_name == "argument":
        named = [parameter.metavar or parameter.name.upper()]
    flags = ", ".join(f"`{name.strip()}`" for name in named)
    no_default = parameter.default is None or isinstance(parameter.default, bool)
    default = "" if no_default or parameter.default == () else f"`{parameter.default}`"
    text = (parameter.help or "").replace("\\[", "[")  # rich's escape
    kind = parameter.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        text = f"{', '.join(word.value for word in kind)}: {text}"
    return f"| {flags} | {default} | {_cell(text)} |"


def option_groups(names: str) -> str:
    """Return the option reference of some groups, `BudgetOptions,PlanningOptions`."""
    return options.reference(*(getattr(options, name) for name in names.split(",")))


def names_of(kind: str) -> str:
    """Return a registry, `METHODS`, as a table of names and what they stand for."""
    found: registry.Registry[Any] = getattr(registry, kind)
    rows = [f"| `{name}` | {_cell(found.summary(name))} |" for name in found]
    return "\n".join(["| name | |", "|---|---|", *rows, ""])


def example(name: str) -> str:
    """Return a script of `examples/`: what it shows, and its code."""
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(text)) or ""
    code = text.partition('"""\n\n')[2] or text
    return f'{doc}\n\n```python title="examples/{name}"\n{code}```\n'


PIECES: dict[str, Callable[[str], str]] = {
    "command": command,
    "options": option_groups,
    "names": names_of,
    "example": example,
}


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Add what lies outside this folder."""
    for path in _outside():
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    """Fill a page's pieces in, and let links out of this folder lead to what was added."""

    def made(match: re.Match[str]) -> str:
        kind, what = match.groups()
        if kind not in PIECES:
            raise PluginError(f"{page.file.src_uri}: no piece is called {kind!r}")
        return PIECES[kind](what)

    text = PIECE.sub(made, markdown)
    if page.file.src_uri in OUTSIDE:
        return text.replace("](docs/", "](")
    return text.replace("](../", "](") if "/" not in page.file.src_uri else text


def _outside() -> Iterator[Path]:
    yield from (ROOT / name for name in OUTSIDE)
    for pattern in RECORDS:
        yield from (path for path in sorted(ROOT.glob(pattern)) if path.suffix in SHOWN)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
