"""Tables and the picture that runs become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from comparison import Results, main, table, table_of_originals

FIGURES = {
    "ranks": 2, "seconds_per_step": 0.25, "processor_seconds_per_step": 0.2, "peak_bytes": 30 * 2**20,
    "step_bytes": 10 * 2**20, "step_bytes_by_formula": 9 * 2**20, "sent_bytes_per_step": 2**19,
}  # fmt: skip


def write(folder: Path, flags: dict[str, str], accuracy: float, **figures: Any) -> Results:
    """Results of ten steps."""
    held_out = {"0": {"accuracy": 0.5}, "9": {"accuracy": 0.6}, "10": {"accuracy": accuracy}}
    losses = {"1": 1.0, "2": accuracy}
    results = {"run": flags, "losses": losses, "held_out": held_out, "constant": {"accuracy": 0.6}}
    folder.mkdir(parents=True)
    for name, values in (("results", results), ("figures", {**FIGURES, **figures})):
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return Results.read(folder)


def runs_of(folder: Path) -> list[Results]:
    """A run of ours, the original's, and a run of ours at another rate."""
    flags = {"method": "badam", "lr": "1.0", "implementation": "ours"}
    original = {"seconds_per_step": None, "processor_seconds_per_step": 0.4, "step_bytes_by_formula": None}
    return [
        write(folder / "ours", flags, 0.9),
        write(folder / "theirs", {**flags, "implementation": "original"}, 0.875, **original, step_bytes=20 * 2**20),
        write(folder / "other", {**flags, "lr": "2.0"}, 0.7),
    ]


def test_runs_become_a_table(tmp_path: Path) -> None:
    assert table(runs_of(tmp_path))[2:] == [
        "| one answer for all | 0 | 0.600 | - | - | - | - | - | - | - |",
        "| ours | 10 | 0.900 | 2 | 0.25 | 0.20 | 10.0 | 9.0 | 0.5 | 30.0 |",
        "| theirs | 10 | 0.875 | 2 | - | 0.40 | 20.0 | - | 0.5 | 30.0 |",
        "| other | 10 | 0.700 | 2 | 0.25 | 0.20 | 10.0 | 9.0 | 0.5 | 30.0 |",
    ]


def test_an_original_stands_beside_ours_of_the_same_flags(tmp_path: Path) -> None:
    ours, theirs, other = runs_of(tmp_path)
    (row,) = table_of_originals([other, theirs, ours])[2:]
    assert row == (
        "| badam | 10 | 0.9000 / 0.8750 | 2.5e-02 | 0.200 / 0.400 | 0.50 | 10.0 / 20.0 | 0.50 | 30.0 / 30.0 | 1.00 |"
    )
    with pytest.raises(ValueError, match=r"theirs: got 0 runs of ours with its flags, expected 1\. Run the program"):
        table_of_originals([other, theirs])
    with pytest.raises(ValueError, match=r"got no run with --implementation original"):
        table_of_originals([ours, other])


def test_runs_of_other_figures_are_refused(tmp_path: Path) -> None:
    runs = runs_of(tmp_path)
    object.__setattr__(runs[2], "held_out", {0: {"loss": 1.0}})
    with pytest.raises(ValueError, match=r"other: got figures loss, expected accuracy"):
        table(runs)
    with pytest.raises(ValueError, match=r"got no folder with results\.json"):
        table([])


def test_runs_become_a_picture(tmp_path: Path) -> None:
    runs_of(tmp_path)
    (tmp_path / "empty").mkdir()
    names = ("ours", "theirs", "other", "empty")
    done = CliRunner().invoke(main, [*(str(tmp_path / name) for name in names), "--plot", str(tmp_path / "found.png")])
    assert done.exit_code == 0, done.output
    assert done.output.count("\n") == 6
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    wrong = CliRunner().invoke(main, [str(tmp_path / "ours"), "--originals"])
    assert wrong.exit_code == 2
    assert "got no run with --implementation original" in wrong.output
