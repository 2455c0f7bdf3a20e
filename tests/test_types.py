"""A type checker of a user sees classes, not Any, and finds wrong arguments."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "data" / "user_program.py"


def test_a_strict_type_checker_sees_what_users_import() -> None:
    """Each comment of the program names the revealed type's last word, or the error that has to be found there."""
    pytest.importorskip("mypy")
    # With the project's own options, so that what `make test` has checked is not checked again.
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-pretty", str(PROGRAM)],
        env={**os.environ, "MYPYPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found: dict[int, str] = {}
    for line in checked.stdout.splitlines():
        if revealed := re.search(r'user_program\.py:(\d+): note: Revealed type is "(.*)"', line):
            found[int(revealed[1])] = re.split(r"[.\s]", re.sub(r"\[.*|^def .* -> ", "", revealed[2]))[-1]
        elif error := re.search(r"user_program\.py:(\d+): error: .*\[([a-z-]+)\]$", line):
            found[int(error[1])] = f"error: {error[2]}"
    lines = enumerate(PROGRAM.read_text().splitlines(), start=1)
    expected = {number: said[1] for number, line in lines if (said := re.search(r"\S  # (.*)$", line))}
    assert found == expected, checked.stdout + checked.stderr
