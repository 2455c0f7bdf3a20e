"""The benchmark program: flags, one small case end to end, and the line of a case in which theirs crashes."""

from __future__ import annotations

import re

from benchmark_optimizers import HEADER, main, row
from click.testing import CliRunner
from contest import Result

SMALL = ["--hidden", "64", "--layers", "1", "--steps", "2", "--warm-up", "1"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_benchmark_prints_one_table_of_both_sides() -> None:
    outcome = CliRunner().invoke(main, [*SMALL, "--case", "zero2", "--optimizer", "came"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    environment, _, header, rule, line = outcome.stdout.strip().splitlines()
    assert "12 tensors" in environment
    assert "Medians of 2 steps after 1 of warm-up" in environment
    assert cells(header) == list(HEADER)
    assert rule.count("---") == len(HEADER)
    name, mesh, ranks, ratio, over_alone, *times, ours, theirs = cells(line)
    assert (name, mesh, ranks, ours) == ("came", "zero2", "2", "3")
    # ColossalAI's sends for every tensor: 2 for each of 9 matrices here, 3 of them twice, and more.
    assert int(theirs) > 20
    assert all(float(re.sub(r"\*", "", value)) > 0 for value in (ratio, over_alone, *times))


def test_benchmark_row_holds_medians_ratios_and_collectives() -> None:
    results = {
        "ours": Result(milliseconds=(1.0, 2.0, 90.0), collectives=2),
        "theirs": Result(milliseconds=(30.0, 25.0, 24.0), collectives=133),
        "alone": Result(milliseconds=(1.6, 1.6, 1.6), collectives=0),
        "AdamW": Result(milliseconds=(3.0, 3.0, 3.0), collectives=0),
    }
    line = row("zero2", "adafactor", results)
    assert line == "| adafactor | zero2 | 2 | **12.5** | 1.25 | 2.0 | 25.0 | 1.6 | 3.0 | 2 | 133 |"
    del results["theirs"]
    line = row("zero2", "adafactor", results, error="RuntimeError: a | b")
    assert line == "| adafactor | zero2 | 2 | - | 1.25 | 2.0 | crashes: RuntimeError: a \\| b | 1.6 | 3.0 | 2 | - |"
