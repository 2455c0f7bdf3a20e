"""The table of what waits for `make test-full` fits the suite, and leaves every test a case in `make test`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from full import FULL, waits


def test_table_of_what_waits_fits_the_suite_and_leaves_a_case_of_each_test() -> None:
    pytest.importorskip("colossalai")
    root = Path(__file__).parents[1]
    files = sorted({f"tests/{key.partition('::')[0]}" for key in FULL})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "full or not full", *files]
    text = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    cases = [line for line in text.splitlines() if line.startswith("tests/") and "[" in line]
    found = {reason for case in cases if (reason := waits(case)) is not None}
    assert {(key, pattern) for key, patterns in FULL.items() for pattern in patterns} == found
    quick = [case.removeprefix("tests/") for case in cases if waits(case) is None]
    assert [key for key in FULL if not any(case.startswith((f"{key}[", f"{key}::")) for case in quick)] == []
