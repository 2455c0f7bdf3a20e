"""The benchmark program: flags, one small case end to end, and the line of a case in which theirs crashes."""

from __future__ import annotations

import re

import switches
from click.testing import CliRunner
from inner_step import HEADER, Result, line, main

SMALL = ["--hidden", "64", "--layers", "1", "--steps", "2", "--warm-up", "1"]


def cells(text: str) -> list[str]:
    return [cell.strip() for cell in text.strip("|").split(" | ")]


def test_benchmark_prints_one_table_of_both_sides() -> None:
    outcome = CliRunner().invoke(main, [*SMALL, "--case", "zero2", "--optimizer", "came"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    environment, _, header, rule, last = outcome.stdout.strip().splitlines()
    assert "12 tensors" in environment
    assert "Medians of 2 steps after 1 of warm-up" in environment
    assert cells(header) == list(HEADER)
    assert rule.count("---") == len(HEADER)
    name, mesh, ranks, ratio, over_alone, *times, ours, theirs = cells(last)
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
    assert (
        line("zero2", "adafactor", results)
        == "| adafactor | zero2 | 2 | **12.5** | 1.25 | 2.0 | 25.0 | 1.6 | 3.0 | 2 | 133 |"
    )
    del results["theirs"]
    got = line("zero2", "adafactor", results, error="RuntimeError: a | b")
    assert got == "| adafactor | zero2 | 2 | - | 1.25 | 2.0 | crashes: RuntimeError: a \\| b | 1.6 | 3.0 | 2 | - |"


def test_benchmark_of_switches_compares_a_step_with_and_without() -> None:
    small = ["--case", "zero2", "--hidden", "16", "--layers", "2", "--switches", "2"]
    outcome = CliRunner().invoke(switches.main, small, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    *_, header, _, last = outcome.stdout.strip().splitlines()
    assert cells(header) == list(switches.HEADER)
    mesh, ranks, _, _, step, passes = cells(last)
    assert (mesh, ranks) == ("zero2", "2")
    assert float(step) > 0
    assert float(passes) > 0


def test_benchmark_row_of_switches_subtracts_a_step() -> None:
    times = switches.Times(passes=[50.0], steps=[10.0, 12.0, 90.0], switching=[18.0, 19.0, 70.0])
    assert times.line("zero2", 2) == "| zero2 | 2 | **0.58** | 7.0 | 12.0 | 50.0 |"
