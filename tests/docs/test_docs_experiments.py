"""The figures of docs/experiments.md: estimates are made again, others are those of the pages with their commands."""

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

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/experiments.md").read_text()


def section(title: str, text: str = PAGE) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> dict[str, list[str]]:
    """First cell of every row of tables -> the others, without the stars of the ratio."""
    lines = (line for line in text.splitlines() if line.startswith("| "))
    cells = ([cell.strip().replace("**", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    return {first: others for first, *others in cells}


@cache
def printed(title: str) -> dict[tuple[str, str, int, str], dict[str, Any]]:
    """What the estimates of a section say, by model, optimizer, number of GPUs and how they share."""
    found: dict[tuple[str, str, int, str], dict[str, Any]] = {}
    for command in re.findall(r"^colossal-bcd (estimate .+)$", section(title), re.MULTILINE):
        result = CliRunner().invoke(cli, [*shlex.split(command), "--json"])
        assert result.exit_code == 0, result.output
        for each in json.loads(result.stdout)["estimates"]:
            kind = "FSDP2" if each["mesh"]["sharded_weights"] else f"ZeRO {each['mesh']['zero']}"
            found[each["model"]["name"], each["optimizer"]["name"], each["mesh"]["gpus"], kind] = each
    return found


MEMORY = rows(section("Memory of BAdam"))
MODELS = [name for name in MEMORY if name.startswith("llama")]


def of_the_row(name: str) -> dict[str, Any]:
    model, optimizer, *gpus = name.split(", ")
    key = (model, optimizer, 4, "FSDP2") if gpus else (model, optimizer, 1, "ZeRO 0")
    return printed("Memory of BAdam")[key]


def test_every_estimate_of_memory_has_a_row() -> None:
    assert len(MODELS) == len(printed("Memory of BAdam")) == 7


@pytest.mark.parametrize("name", MODELS)
def test_memory_is_what_the_estimator_says(name: str) -> None:
    found = of_the_row(name)
    _, step, _, peak = MEMORY[name]
    assert [step, peak] == [f"{number / 1e9:.2f}" for number in (found["bytes"]["step"]["total"], found["peak"])]


@pytest.mark.parametrize("name", MODELS)
def test_formula_is_the_papers(name: str) -> None:
    """18 M, or 2 M + 16 M / D, over the number of GPUs; M in billions, D layers."""
    found = of_the_row(name)
    factor = 18 if "adamw" in name else 2 + 16 / found["model"]["layers"]
    expected = factor * found["model"]["parameters"] / 1e9 / found["mesh"]["gpus"]
    assert MEMORY[name][0] == f"{expected:.1f}"
    # The formula takes embeddings and head for parts of blocks; here they are in none.
    assert found["bytes"]["step"]["total"] / 1e9 == pytest.approx(expected, rel=0.03)


def test_how_far_estimates_are_below_what_was_measured() -> None:
    cells = [MEMORY[f"{model}, badam"] for model in ("llama-3-8b", "llama-2-7b")]
    far = [round(100 * (1 - float(peak) / float(measured))) for _, _, measured, peak in cells]
    assert f"The estimate is {far[0]} % and {far[1]} % below" in PAGE


def test_buffers_of_four_gpus_are_what_the_page_says() -> None:
    passes = of_the_row("llama-3-70b, badam, 4 GPUs")["bytes"]["forward_backward"]
    share, total = passes["activations"] + passes["buffers"], passes["total"]
    assert f"they are {share / 1e9:.0f} GB of the {total / 1e9:.0f}." in PAGE


TRAFFIC = rows(section("Communication"))


@pytest.mark.parametrize("name", [name for name in TRAFFIC if name not in ("optimizer, 4 GPUs", "---")])
def test_traffic_is_what_the_estimator_says(name: str) -> None:
    optimizer, kind = name.split(", ")
    traffic = printed("Communication")["llama-3-8b", optimizer, 4, kind]["traffic"]
    calls = sum(each["collectives"] for each in traffic.values())
    assert TRAFFIC[name] == [*(f"{traffic[what]['bytes'] / 1e9:.2f}" for what in ("gradients", "weights")), str(calls)]


def test_shares_of_traffic_are_those_of_their_tables() -> None:
    sent = [printed("Communication")["llama-3-8b", name, 4, "ZeRO 2"]["traffic"] for name in ("adamw", "badam")]
    adamw, badam = (sum(each["bytes"] for each in traffic.values()) for traffic in sent)
    assert f"sends 1/{adamw / badam:.0f} of AdamW's bytes" in PAGE
    measured = rows((ROOT / "docs/benchmarks.md").read_text())["BAdam"][1]
    assert f"it was {float(measured):.3f} of" in PAGE


@pytest.mark.parametrize("title", ["Instruction tuning", "GLUE and SuperGLUE"])
def test_runs_are_those_of_the_examples(title: str) -> None:
    name = {"Instruction tuning": "instruct", "GLUE and SuperGLUE": "glue"}[title]
    reached = section("What a small run reaches", (ROOT / f"examples/{name}/README.md").read_text())
    theirs = rows(reached.split("\n\n```\nfor lr")[0])
    table = rows(section(title).split("docstrings")[1])
    assert {key: cells for key, cells in table.items() if key in theirs} == theirs


def test_losses_of_methods_are_those_of_the_example() -> None:
    theirs = rows(section("Methods at the same data", (ROOT / "examples/instruct/README.md").read_text()))
    mine = rows(section("Instruction tuning").split("Nine methods")[1])
    assert {name: [cells[1], cells[3]] for name, cells in theirs.items()} | {"---": ["---"] * 2} == {
        **mine,
        "---": ["---"] * 2,
    }


def test_losses_of_pretraining_are_those_of_the_example() -> None:
    theirs = rows(
        (ROOT / "examples/pretrain/README.md").read_text().split("## What a small run reaches")[1].split("!")[0]
    )
    assert rows(section("Llama-60M on C4")) == theirs
    assert len(theirs) > 3


def test_losses_of_bread_are_those_of_its_page() -> None:
    theirs = rows((ROOT / "docs/bread.md").read_text().split("## Measured")[1])
    assert rows(section("BREAD")) == {name: cells[1:2] for name, cells in theirs.items()}


def test_gaps_are_those_of_the_page_on_golore() -> None:
    theirs = rows(section("Measured", (ROOT / "docs/golore.md").read_text()))
    for name, (_, adamw, sgd) in rows(section("Non-convergence of GaLore")).items():
        if name != "curve":
            assert [adamw, sgd] == [theirs[name][0], theirs[name][3]]


def test_errors_and_collectives_are_those_of_the_readme() -> None:
    """The README's own test compares it with the benchmarks."""
    readme = rows((ROOT / "README.md").read_text())
    sides = rows(section("ColossalAI's distributed optimizers"))
    for index, name in enumerate(("LAMB", "Adafactor", "CAME")):
        error, collectives = (readme[key] for key in ("error after five steps", "collectives of a step"))
        expected = [cells[side].split(" / ")[index] for cells in (error, collectives) for side in (0, 1)]
        assert sides[name] == expected


def test_programs_of_the_table_are_there() -> None:
    table = PAGE.split("\n## ")[0]
    paths = re.findall(r"`((?:examples|benchmarks)/[\w/.]+)`", table)
    assert len(paths) >= 8
    assert all((ROOT / path).exists() for path in paths)
