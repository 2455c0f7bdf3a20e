"""The figures of docs/choosing.md are what its commands print, and what the pages of the benchmarks say."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from colossal_bcd.cli.commands import cli

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "choosing.md").read_text()


def rows(text: str) -> dict[str, list[str]]:
    """First cell of every row of tables -> the others; of rows with the same one, the last."""
    lines = (line for line in text.splitlines() if line.startswith("| "))
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


@cache
def printed() -> dict[tuple[str, int], dict[str, Any]]:
    """What the page's estimates say, by optimizer and number of GPUs."""
    found = {}
    for command in re.findall(r"^colossal-bcd (estimate .+)$", PAGE, re.MULTILINE):
        result = CliRunner().invoke(cli, [*shlex.split(command), "--json"])
        assert result.exit_code == 0, result.output
        for each in json.loads(result.stdout)["estimates"]:
            found[each["optimizer"]["name"], each["mesh"]["gpus"]] = each
    return found


@pytest.mark.parametrize(
    ("row", "optimizer"),
    {
        "AdamW": "adamw", "LAMB": "lamb", "Lion": "lion", "CAME": "came", "GaLore, rank 128": "galore",
        "GaLore, 8 bits, rank 128": "galore-8bit", "SGD without momentum": "sgd", "Adafactor": "adafactor",
        "LoRA, rank 128, AdamW": "lora", "BAdam, a layer at a time": "badam",
    }.items(),
)  # fmt: skip
def test_bytes_are_those_of_the_estimates(row: str, optimizer: str) -> None:
    one = printed()[optimizer, 1]
    eight = printed().get((optimizer, 8))
    bytes_of = [one["bytes"]["step"][name] for name in ("masters", "states", "gradients")] + [one["peak"]]
    expected = [f"{number / 1e9:.2f}" for number in bytes_of] + [f"{eight['peak'] / 1e9:.2f}" if eight else ""]
    assert rows(PAGE.split("## Memory")[1].split("##")[0])[row] == expected


def test_traffic_is_that_of_the_benchmarks() -> None:
    measured, found = rows((DOCS / "benchmarks.md").read_text()), rows(PAGE)
    pairs = {
        "BAdam, one of 8 layers": "BAdam",
        "GaLore, low-rank gradients": "GaLore, low-rank gradients",
        "GaLore, low-rank updates, too": "GaLore, low-rank updates",
    }
    for row, name in pairs.items():
        _, ratio, _, _, _, _, _, collectives, others, *_ = measured[name]
        assert found[row][0].startswith(f"{float(ratio.strip('*')):.3f} of ")
        assert found[row][1] == f"{collectives} instead of {others}"


def test_times_are_those_of_the_gpu() -> None:
    measured = rows((DOCS / "benchmarks_gpu.md").read_text())
    (head, _, times) = re.findall(r"^\|(.*)\|$", PAGE.split("## Time")[1].split("##")[0], re.MULTILINE)
    found = dict(
        zip((name.strip() for name in head.split("|")), (time.strip() for time in times.split("|")), strict=True)
    )
    compiled = {name: measured[f"{name}, compiled"][-1] for name in ("SGD", "Lion", "AdamW", "Adafactor", "CAME")}
    others = {"LAMB": measured["Lamb, compiled"][-1], "GaLore, rank 128": measured["GaLoreAdamW, rank 128"][-1]}
    assert found == {**compiled, **others}
