"""The README: its code runs, its tables are those of the pages, and its picture can be drawn."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import compatibility
import models
import pytest
import readme_picture
from click.testing import CliRunner
from common import Written

from colossal_bcd.testing import run_ranks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "docs/benchmarks.md").read_text()


def after_the_change() -> str:
    """What the diff makes of the user's program."""
    code = re.search(r"```diff\n(.*?)```", README, re.DOTALL)
    assert code is not None
    return "\n".join(line[1:] for line in code[1].splitlines() if not line.startswith("-"))


def boosted_by(code: str) -> str:
    from colossalai.booster import Booster

    names: dict[str, Any] = {"Booster": Booster, "model": models.llama()}
    exec(code, names)
    names["booster"].backward(models.loss(names["model"], models.tokens(0)), names["optimizer"])
    names["optimizer"].step()
    return type(names["optimizer"]).__name__


def test_code_of_the_change_trains() -> None:
    assert len(re.findall(r"^[+-][^ ]", README[README.index("```diff") :], re.MULTILINE)) <= 6
    assert run_ranks(1, boosted_by, after_the_change()) == ["ZeroOptimizer"]


def test_commands_are_targets_of_the_makefile() -> None:
    commands = re.findall(r"`?make ([a-z-]+)", README)
    assert {"demo", "test", "bench", "gpu"} <= set(commands)
    for target in commands:
        said = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stderr


def test_programs_and_pages_are_there() -> None:
    for path in re.findall(r"python ([\w/]+\.py)", README) + re.findall(r"\]\(([\w/]+\.\w+)\)", README):
        assert (ROOT / path).is_file(), path


def test_table_of_compatibility_is_that_of_the_page() -> None:
    page = compatibility.read_page((ROOT / "docs/compatibility.md").read_text())
    assert f"\n{compatibility.summary(page)}\n" in README


def table_below(command: str) -> Written:
    """The table that a program has left on the page of benchmarks."""
    below = BENCHMARKS.partition(f"\npython benchmarks/{command}\n")[2]
    start = below.index("\n|") + 1
    return Written.read(f"about\n\n{below[start : below.index(chr(10) * 2, start)]}")


def test_table_of_sides_is_that_of_the_benchmarks() -> None:
    rows = {
        cells[0]: cells[1:]
        for line in README.splitlines()
        if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("| ").split(" | ")]) == 4
    }
    steps = {
        row["optimizer"]: row
        for row in table_below("step.py").rows
        if (row["where"], row["step"]) == ("zero2 x2", "inner")
    }
    sides = {(row["optimizer"], row["side"].partition(",")[0]): row for row in table_below("sides.py").rows}
    names = ("lamb", "adafactor", "came")

    def cells(rows: Iterable[Mapping[str, str]], column: str) -> str:
        return " / ".join(row[column] for row in rows)

    for index, side in enumerate(("ours", "ColossalAI's", "the original")):
        found = [sides[name, side] for name in names]
        assert rows["error after five steps"][index] == cells(found, "error / movement")
        again = [row["error after going on from files / movement"].partition(":")[0] for row in found]
        assert rows["error after going on from a checkpoint"][index] == " / ".join(again)
    for index, side in enumerate(("ours", "theirs")):
        found = [steps[name] for name in names]
        assert rows["milliseconds of a step"][index] == cells(found, f"{side}, ms")
        assert rows["collectives of a step"][index] == cells(found, f"collectives, {side}")


def test_picture_is_drawn_from_bytes_and_losses(tmp_path: Path) -> None:
    small = ["--steps", "2", "--eval-every", "1", "--hidden-size", "32", "--layers", "1", "--sequence-length", "8"]
    small += ["--vocab-size", "300", "--batch-size", "2"]
    readme_picture.train(tmp_path, small)
    for name in readme_picture.RUNS:
        steps, losses = readme_picture.read_losses(tmp_path / name / "losses.csv", "held_out")
        assert steps == [0, 1, 2]
        assert losses[-1] < losses[0]
    arguments = ["--losses", str(tmp_path), "--model", "smollm2-135m", "--output", str(tmp_path / "new/picture.png")]
    outcome = CliRunner().invoke(readme_picture.main, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    assert (tmp_path / "new/picture.png").read_bytes().startswith(b"\x89PNG")
    assert (ROOT / "docs/pictures/readme.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["adamw", "badam"])
def test_bytes_of_the_picture_are_those_of_the_command(name: str) -> None:
    """docs/memory.md has the same figures, which its own test compares with the command."""
    page = (ROOT / "docs/memory.md").read_text()
    row = re.search(rf"^\| llama-3-8b, {name} \|.* \| ([\d.]+) \|$", page, re.MULTILINE)
    assert row is not None
    found = readme_picture.budgets("llama-3-8b", readme_picture.BATCH, readme_picture.LENGTH)
    peak = found[list(readme_picture.COMPARED).index(name)].peak
    assert f"{peak / 1e9:.2f}" == row[1]
