"""The table of what waits for `make test-full` fits the suite, and leaves every test a case in `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest
from full import FULL, LONG, waits


class Collected:
    """A plugin of pytest that keeps the names of what it collects."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names += [item.nodeid for item in session.items]


def test_long_files_are_there() -> None:
    tests = Path(__file__).parent
    assert [name for name in LONG if not (tests / name).exists()] == []


def test_table_of_what_waits_fits_the_suite_and_leaves_a_case_of_each_test() -> None:
    pytest.importorskip("colossalai")
    root = Path(__file__).parents[1]
    files = sorted({f"tests/{key.partition('::')[0]}" for key in FULL})
    collected = Collected()
    # In this process, which has imported most of them.
    options = ["--collect-only", "-qq", "-p", "no:cacheprovider", "-m", "full or not full", "--rootdir", str(root)]
    assert pytest.main([*options, *(str(root / file) for file in files)], plugins=[collected]) == 0
    cases = [name for name in collected.names if "[" in name]
    found = {reason for case in cases if (reason := waits(case)) is not None}
    assert {(key, pattern) for key, patterns in FULL.items() for pattern in patterns} == found
    quick = [case.removeprefix("tests/") for case in cases if waits(case) is None]
    assert [key for key in FULL if not any(case.startswith((f"{key}[", f"{key}::")) for case in quick)] == []
