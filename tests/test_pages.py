"""README and the pages: their Python blocks run, their command lines parse, their links lead on."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn

import robust_prune
from robust_prune.cli import _program_first, app
from robust_prune.graph.tracing.adapters import _BY_CLASS, _BY_NAME
from robust_prune.registry import ALLOCATIONS, ESTIMATORS, METHODS, SCORES
from tests.conftest import tiny_resnet

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [*PAGES, ROOT / "RELEASING.md", ROOT / "SECURITY.md"]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
# options that pages name of other programs: pip, torchrun, the benchmarks, mkdocs
FOREIGN = {"--nproc-per-node", "--level", "--help", "--version", "--strict"}
COMMANDS: Any = typer.main.get_command(app)
PROGRAMS = ("robust-prune ", "make ", "pip ", "python ", "accelerate ", "torchrun ")
FLAGS = {
    flag.strip()
    for command in (COMMANDS, *COMMANDS.commands.values())
    for parameter in command.params
    for flag in (*parameter.opts, *parameter.secondary_opts)
}


def of(pages: list[Path]) -> Any:
    return pytest.mark.parametrize("page", pages, ids=lambda path: path.stem)


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in these languages; '' is a block that names none."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [code for language, code in found if language in languages]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


def command_lines(page: Path) -> list[str]:
    """The commands of a page's shell blocks, continued lines joined, without comments."""
    text = "\n".join(blocks(page, "", "sh", "bash", "shell", "console"))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    commands = (line.partition("#")[0].removeprefix("$ ").strip() for line in lines)
    return [line for line in commands if line.startswith(PROGRAMS)]


class SmallNet(nn.Module):
    """What the pages call your model; its classifier is named as timm's ResNets name theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 3, padding=1, stride=2)
        self.fc = nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.first(images)).relu()
        return self.fc(self.second(x).relu().mean((2, 3)))


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the pages take for granted: a model and its file, training images, an empty folder."""
    registries = METHODS, SCORES, ESTIMATORS, ALLOCATIONS
    for registry in registries:
        for name in registry:
            registry.find(name)  # a file registers when it is first imported, and never again
    kept = [(r, dict(r._functions), dict(r._facts)) for r in registries]
    adapters = dict(_BY_CLASS), dict(_BY_NAME)
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(48, 3, 12, 12, generator=generator)
    labels = torch.randint(0, 10, (48,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallNet().eval()
        robust_prune.save(tiny_resnet(), tmp_path / "model.safetensors")
    yield {
        "model": model,
        "images": images,
        "labels": labels,
        "data": [(images, labels)],
        "MyNet": SmallNet,
    }
    for registry, functions, facts in kept:
        registry._functions, registry._facts = functions, facts
    for registered, before in zip((_BY_CLASS, _BY_NAME), adapters, strict=True):
        registered.clear()
        registered.update(before)


@pytest.mark.parametrize("library", ["openvino", "executorch"])
def test_other_runtimes_give_the_modules_logits(library: str, given: dict[str, Any]) -> None:
    pytest.importorskip(library)
    model, images = given["model"], given["images"]
    robust_prune.export(model, "model.onnx", to="onnx", input_size=(3, 12, 12))
    robust_prune.export(model, "model.pt2", to="torch-export", input_size=(3, 12, 12))
    code = next(
        c
        for c in blocks(ROOT / "docs/deploying.md", "py")
        if f"import {library}" in c or f"from {library}" in c
    )
    exec(compile(code, library, "exec"), given)
    logits = torch.as_tensor(given["logits"])
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images[: len(logits)]), rtol=1e-4, atol=1e-5)


@of(WITH_PYTHON)
def test_python_blocks_run_in_their_order(page: Path, given: dict[str, Any]) -> None:
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), given)


@of(GUIDES)
def test_command_lines_are_those_that_the_program_takes(page: Path) -> None:
    for line in command_lines(page):
        words = shlex.split(line)
        if "robust-prune" in words or "robust_prune" in words:
            start = words.index("robust-prune" if "robust-prune" in words else "robust_prune")
            parse(words[start + 1 :])
        elif words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif words[1:2] == ["-m"]:
            assert importlib.util.find_spec(words[2]) is not None, line


def parse(arguments: list[str]) -> None:
    """Let the real program read a command line, without running it."""
    typed = _program_first(arguments)
    if not set(typed) & set(COMMANDS.commands):
        return  # a picture of the usage, or --version
    with COMMANDS.make_context("robust-prune", typed, resilient_parsing=False) as context:
        name, command, rest = COMMANDS.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        with command.make_context(name, list(rest), parent=context):
            pass


@of(GUIDES)
def test_flags_in_the_text_exist(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    named = {
        flag
        for span in SPAN.findall(text)
        if not span.startswith(("pip ", "python "))
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)
    }
    assert named <= FLAGS | FOREIGN


@of(GUIDES)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith(("http://", "https://")):
            assert (page.parent / link).exists(), link


@of(GUIDES)
def test_extras_that_are_named_exist(page: Path) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    named = re.findall(r"robust-prune\[([\w,]+)\]", page.read_text(encoding="utf-8"))
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    assert {name for found in named for name in found.split(",")} <= extras


def test_a_wrong_flag_in_a_page_fails() -> None:
    with pytest.raises(Exception, match="--rato"):
        parse(["compress", "model.pt", "--rato", "0.5"])
    parse(["compress", "model.pt", "--ratio", "0.5", "--json"])


def test_the_readme_is_a_page_and_shows_the_three_ways_in() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert "robust-prune compress model.pt --ratio 0.5" in text
    assert "robust_prune.MRSImportance(model, (images, labels)" in text
    assert "`make bench`" in text


def test_the_citation_names_the_version_of_the_package() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {robust_prune.__version__}\n" in text


@pytest.fixture(scope="module")
def hooks() -> Any:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("page_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["page_hooks"] = module
    spec.loader.exec_module(module)
    return module


def test_the_pages_show_every_command_and_every_option(hooks: Any) -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    for name, command in COMMANDS.commands.items():
        assert f"{{{{ command {name} }}}}" in page
        table = hooks.command(name)
        for parameter in command.params:
            if parameter.param_type_name == "option":
                flag = [*parameter.opts, *parameter.secondary_opts][0]
                assert f"`{flag.strip()}`" in table
    from robust_prune import options

    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    groups = {name for name in options.__all__ if name.endswith("Options")} - {"Options"}
    shown = set(re.findall(r"\{\{ options (\w+) \}\}", page))
    # shown with those that they add to
    assert groups - shown == {"TrainingOptions", "JudgingOptions", "NewOutputOptions"}


def test_links_out_of_the_folder_follow_the_files_that_are_added(hooks: Any) -> None:
    class File:
        src_uri = "results.md"

    class Page:
        file = File

    text = "[a](../benchmarks/LOG.md) {{ names METHODS }}"
    assert hooks.on_page_markdown(text, page=Page) == "[a](benchmarks/LOG.md) {{ names METHODS }}"
    made = hooks.on_page_markdown("{{ names METHODS }}", page=Page)
    assert all(f"| `{name}` |" in made for name in METHODS)
    with pytest.raises(Exception, match="no piece is called 'nothing'"):
        hooks.on_page_markdown("{{ nothing here }}", page=Page)
