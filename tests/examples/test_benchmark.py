"""The benchmark program: flags, one small case end to end, and the line of a case in which theirs crashes."""

from __future__ import annotations

import re

import benchmark_switch
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


def test_benchmark_of_switches_compares_a_step_with_and_without() -> None:
    small = ["--case", "zero2", "--hidden", "16", "--layers", "2", "--switches", "2"]
    outcome = CliRunner().invoke(benchmark_switch.main, small, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    *_, header, _, line = outcome.stdout.strip().splitlines()
    assert cells(header) == list(benchmark_switch.HEADER)
    mesh, ranks, _, _, step, passes = cells(line)
    assert (mesh, ranks) == ("zero2", "2")
    assert float(step) > 0
    assert float(passes) > 0


def test_benchmark_row_of_switches_subtracts_a_step() -> None:
    times = benchmark_switch.Times(passes=[50.0], steps=[10.0, 12.0, 90.0], switching=[18.0, 19.0, 70.0])
    assert times.row("zero2", 2) == "| zero2 | 2 | **0.58** | 7.0 | 12.0 | 50.0 |"
