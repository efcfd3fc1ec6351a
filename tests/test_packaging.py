"""The wheel holds the package and works where nothing else of this folder is."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
ROOT = Path(__file__).parents[1]
PACKAGE = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "robust_prune").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
TRY = """
import torch
from torch import nn
import robust_prune
from robust_prune.report import to_html

assert robust_prune.__file__.startswith({here!r}), robust_prune.__file__
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
data = torch.rand(24, 3, 8, 8), torch.arange(24) % 4
result = robust_prune.compress(model, data, prune_ratio=0.4, evaluation="pgd", test=data)
assert "<html" in to_html(result.report)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == PACKAGE
    assert "robust_prune/py.typed" in names


def test_the_archive_holds_what_tests_and_pages_need(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= PACKAGE
    for needed in (
        *("README.md", "CONTRIBUTING.md", "CITATION.cff", "Makefile", "mkdocs.yml"),
        *("constraints.txt", "docs/index.md", "docs/hooks.py", "examples/quickstart.py"),
        *("tests/conftest.py", "benchmarks/LOG.md"),
    ):
        assert needed in names


def test_the_wheel_works_in_an_environment_of_its_own(built: Path, tmp_path: Path) -> None:
    """The environment sees this one's dependencies, but not its editable install of this folder."""
    home = tmp_path / "environment"
    venv.create(home, symlinks=True)
    (site,) = (home / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = home / "bin" / "python"
    done = subprocess.run(
        [python, "-c", TRY.format(here=str(site))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        env={"PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    told = subprocess.run(
        [python, "-m", "robust_prune", "--version"], cwd=tmp_path, capture_output=True, text=True
    )
    assert told.stdout.startswith("robust-prune ")
