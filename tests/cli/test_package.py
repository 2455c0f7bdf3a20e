"""What is shipped: a wheel and an sdist that install without network and pass `doctor`, and files that agree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import colossal_bcd

ROOT = Path(__file__).parents[2]
SITE = [path for path in sys.path if path.endswith("site-packages")]


def run(*command: Any, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(each) for each in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**clean, **environment},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel, made of the sdist, as `python -m build` does, with the setuptools that is installed."""
    found = tuple(map(int, version("setuptools").split(".")[:2]))
    if found < (70, 1):
        pytest.skip(f"makes wheels with setuptools 70.1 or newer, as the extra `test` asks for; here is {found}")
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", ".git", "*.egg-info", ".venv*", ".*_cache", "build", "demo")
    source.mkdir()
    for name in ("colossal_bcd", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff"):
        whole = ROOT / name
        (shutil.copytree if whole.is_dir() else shutil.copy)(
            whole, source / name, **({"ignore": ignored} if whole.is_dir() else {})
        )
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, unpacked, cwd=folder)
    return folder


def test_wheel_installs_without_network_and_passes_doctor(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", "--target", tmp_path / "installed", wheel, cwd=tmp_path)
    path = os.pathsep.join((str(tmp_path / "installed"), *SITE))
    where = run(
        sys.executable, "-S", "-c", "import colossal_bcd; print(colossal_bcd.__file__)", cwd=tmp_path, PYTHONPATH=path
    )
    assert where.startswith(str(tmp_path / "installed"))
    said = run(sys.executable, "-S", tmp_path / "installed/bin/colossal-bcd", "doctor", cwd=tmp_path, PYTHONPATH=path)
    assert "passed" in said


def test_wheel_has_licence_types_and_command(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"colossal_bcd-{colossal_bcd.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        metadata = next(packed.read(name).decode() for name in names if name.endswith("METADATA"))
        entries = next(packed.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert "colossal_bcd/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert all(name.startswith("colossal_bcd") for name in names), "tests and benchmarks stay at home"
    assert "License: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    for extra in ("cli", "colossalai", "trainer", "low-bit", "examples", "docs", "test"):
        assert f"Provides-Extra: {extra}" in metadata
    required = re.findall(r"^Requires-Dist: ([a-z]+)[^;\n]*$", metadata, re.MULTILINE)
    assert sorted(required) == ["safetensors", "torch", "tqdm"]
    assert "colossal-bcd = colossal_bcd.cli:main" in entries


def test_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {colossal_bcd.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert 'version="' not in (ROOT / "setup.py").read_text()


def test_citation_has_the_paper_of_every_method() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    for paper in ("2404.02827", "zs6bRl05g8", "2403.03507", "2410.11289", "1804.04235", "2307.02047", "1904.00962"):
        assert paper in text


def test_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert text.count("\n") == 201
    assert "END OF TERMS AND CONDITIONS" in text


def test_code_is_python_3_10() -> None:
    """The oldest Python that torch 2.5 and transformers 4.51 install on; nothing newer is used."""
    import ast

    for path in (ROOT / "colossal_bcd").rglob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 10))
