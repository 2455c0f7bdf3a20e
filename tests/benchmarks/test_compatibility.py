"""The page of compatibility: complete, and backed by cells that run again."""

from __future__ import annotations

from pathlib import Path

import compatibility
import pytest
from compatibility import BLOCKS, HOSTS, NOT_RUN, Cell, Trial

import colossal_bcd
from colossal_bcd.optim.register import registered

ROOT = Path(__file__).parents[2]
PAGE = compatibility.read_page((ROOT / "docs/compatibility.md").read_text())
ROWS = list(compatibility.optimizers())


def test_page_has_every_registered_optimizer_under_every_host() -> None:
    assert set(registered("colossal_bcd.optim", "colossal_bcd.low_rank")) <= set(ROWS)
    assert set(PAGE) == {(name, host) for name in ROWS for host in HOSTS}
    assert all(hasattr(colossal_bcd, name.removeprefix(BLOCKS).partition(" ")[0]) for name in ROWS)


def test_page_says_why_it_refuses() -> None:
    for key, cell in PAGE.items():
        assert "**" not in cell, key
        assert cell == NOT_RUN or cell.startswith(("yes", "no ")), key
        if "no " in cell.replace(NOT_RUN, ""):
            assert any(kind in cell for kind in ("ValueError: ", "TypeError: ")), key


@pytest.mark.parametrize("shift", ["sample", *range(len(HOSTS))])
def test_cells_are_what_runs_show(shift: str | int) -> None:
    """Every optimizer under one host, another one for each shift; the sample has an optimizer for each host."""
    cells: dict[str, list[str]] = {host: [] for host in HOSTS}
    for index, name in enumerate(ROWS):
        cells[list(HOSTS)[(index + (0 if shift == "sample" else int(shift))) % len(HOSTS)]].append(name)
    if shift == "sample":
        cells = {host: names[:1] for host, names in cells.items()}
    cells = {host: [name for name in names if PAGE[name, host] != NOT_RUN] for host, names in cells.items()}
    found = compatibility.measured(cells)
    assert {key: cell.text(str) for key, cell in found.items()} == {key: PAGE[key] for key in found}


GOOD = Trial(error=1e-14, resumed=0.0)


@pytest.mark.parametrize(
    ("weights", "lora", "text"),
    [
        (GOOD, GOOD, "yes"),
        (Trial(error=float("nan"), resumed=0.0), GOOD, "yes, **differs by nan**"),
        (Trial(error=1e-6, resumed=0.0), GOOD, "yes, **differs by 1e-06**"),
        (GOOD, Trial(error=1e-14, resumed=1e-9), "yes, LoRA **resumes differently**"),
        (GOOD, Trial(said="ValueError: a"), "yes, no LoRA ValueError: a"),
        (Trial(error=1e-14, unsaved="ValueError: b"), GOOD, "yes, no files ValueError: b"),
        (Trial(said="ValueError: c"), GOOD, "no ValueError: c"),
        (GOOD, Trial(), "yes, LoRA **differs by inf**"),
    ],
)
def test_cell_says_what_is_not_as_it_should_be(weights: Trial, lora: Trial, text: str) -> None:
    assert Cell(weights, lora, 1e-12).text(str) == text


def test_page_gives_back_its_cells() -> None:
    cells = {(name, host): Cell(GOOD, GOOD, 1e-12) for name in ROWS for host in HOSTS}
    cells["CAME", "FSDP2"] = Cell(Trial(said="ValueError: no | yes"), GOOD, 1e-12)
    cells["Lamb", "FSDP2"] = Cell(GOOD, Trial(said="ValueError: b"), 1e-12)
    read = compatibility.read_page(compatibility.page(cells))
    assert read["CAME", "FSDP2"] == "no ValueError: no | yes"
    assert read["Lamb", "FSDP2"] == "yes, no LoRA ValueError: b"
    assert [cell for cell in read.values() if cell != "yes"] == [read["CAME", "FSDP2"], read["Lamb", "FSDP2"]]
    lines = compatibility.summary(read).splitlines()
    assert len(lines) == 5
    assert lines[3].startswith("| CAME | ")
    assert "| yes, no LoRA | yes |" in lines[4]


def test_rank_that_disagrees_spoils_the_cell() -> None:
    bad = Trial(error=float("inf"), resumed=1.0)
    assert compatibility.together([GOOD, bad]) == bad
    assert compatibility.together([GOOD, Trial(said="a")]).said == "a"
