"""Instructions from the Python standard library: the source of a function, and its docstring as the answer.

    python examples/instruct/docstrings.py instructions.jsonl

Whole modules are held out, so that no answer is in a function beside one that was trained on.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INSTRUCTION = "Write the docstring of this Python function."
LONGEST, SHORTEST = 1200, 20
"""Characters of a function's source at most, and of an answer at least."""


def pairs(folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """Records with `instruction`, `input`, `output` and `module`, in the order of the modules' names.

    Args:
        folder: of Python files; None: the standard library, without its tests and what was installed into it.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"}.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates that are no Python
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (answer := _answer(node)) is not None:
                source = _without_docstring(node)
                if len(source) <= LONGEST:
                    module = ".".join(parts).removesuffix(".py")
                    yield {"instruction": INSTRUCTION, "input": source, "output": answer, "module": module}


def is_held_out(module: str) -> bool:
    """Whether a module is among the tenth that is kept for evaluation."""
    return hashlib.sha256(module.encode()).digest()[0] % 10 == 0


def _answer(node: ast.FunctionDef) -> str | None:
    """The first paragraph of the docstring, in one line."""
    text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
    return text if len(text) >= SHORTEST else None


def _without_docstring(node: ast.FunctionDef) -> str:
    body = node.body[1:] or [ast.Pass()]
    return ast.unparse(ast.FunctionDef(**{**dict(ast.iter_fields(node)), "body": body, "lineno": 0}))


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in pairs())
