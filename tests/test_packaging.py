"""The built wheel, as another project would meet it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE, PASSES = ROOT / "moonwalk_compile", ROOT / "passes"


def run(*command: str, cwd: Path, **env: str) -> str:
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: a build leaves folders behind, and takes in what an earlier one left."""
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for folder in (PACKAGE, PASSES):
        shutil.copytree(folder, source / folder.name, symlinks=True, ignore=ignore)
    flags = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", "dist")
    run(sys.executable, "-m", "pip", "wheel", *flags, ".", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_files(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    own = [path.relative_to(ROOT).as_posix() for path in PACKAGE.glob("*.py")]
    own += [path.relative_to(ROOT).as_posix() for path in (PACKAGE / "algorithms").glob("*.py")]
    passes = [f"moonwalk_compile/{path.relative_to(ROOT).as_posix()}" for path in PASSES.rglob("*.py")]
    assert sorted(names) == sorted(own + passes)


def test_entry_points_and_license(wheel):
    archive = zipfile.ZipFile(wheel)
    info = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
    text = archive.read(info["entry_points.txt"]).decode()
    assert "[console_scripts]\nmoonwalk = moonwalk_compile.cli:main" in text
    assert "[torch_dynamo_backends]\nmoonwalk = moonwalk_compile.backend:moonwalk" in text
    assert archive.read(info["top_level.txt"]).decode().split() == ["moonwalk_compile"]
    assert "LICENSE" in info
    assert "Requires-Dist: functorch" not in archive.read(info["METADATA"]).decode()


def test_import_from_another_folder(wheel, tmp_path):
    """Modules come from the wheel, not from this checkout, and the name `passes` stays free for its user."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    script = (
        "import importlib.util, moonwalk_compile.cli, moonwalk_compile.passes.cost as cost\n"
        "assert importlib.util.find_spec('passes') is None\n"
        "print(moonwalk_compile.cli.__file__, cost.__file__, sep='\\n')\n"
    )
    files = run(sys.executable, "-c", script, cwd=elsewhere, PYTHONPATH=str(site)).split()
    assert [Path(file).relative_to(site).as_posix() for file in files] == [
        "moonwalk_compile/cli.py",
        "moonwalk_compile/passes/cost.py",
    ]
