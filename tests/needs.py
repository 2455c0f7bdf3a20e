"""Which test files need a library that is not installed: `make test-latest` runs the others."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
WITH_COLOSSALAI = ("colossalai", "colossal_bcd.booster")


def imported(path: Path) -> set[str]:
    """Full names of what a file imports; of a test file at its top, as a test may ask for a library itself."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if path.name.startswith("test_") else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def needing(libraries: Iterable[str]) -> list[Path]:
    """Test files that import one of some modules, or a file of the tests or examples that does."""
    folders = ("tests", "benchmarks", "examples")
    files = {path.stem: path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))}
    imports = {name: imported(path) for name, path in files.items()}
    wanted = tuple(libraries)
    found = {name for name, names in imports.items() if any(_is_in(full, wanted) for full in names)}
    while True:
        more = {
            name
            for name, names in imports.items()
            if name not in found and any(_file_of(full) in found for full in names)
        }
        if not more:
            return [files[name] for name in sorted(found) if name.startswith("test_")]
        found |= more


def _file_of(full: str) -> str:
    """The file that a name is of: `models.llama`, `support.errors.worst`, `examples.badam`."""
    first, _, rest = full.partition(".")
    return rest.partition(".")[0] if first in ("benchmarks", "examples", "support") else first


def _is_in(full: str, libraries: tuple[str, ...]) -> bool:
    return any(full == library or full.startswith(f"{library}.") for library in libraries)


def ignored() -> list[str]:
    """Test files that cannot be imported here, where ColossalAI or a package of originals is missing."""
    installed = packages_distributions()  # not what else has such a name, as examples/badam.py does
    missing = [name for name in ("badam", "came_pytorch", "galore_torch", "peft") if name not in installed]
    if "colossalai" not in installed:
        missing += WITH_COLOSSALAI
    return [str(path) for path in needing(missing)] if missing else []
