"""The page of benchmarks: made of tables alone, with targets judged by them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import memory
import page
import pytest
import scale
import step
import targets
import tensors
import traffic
from click.testing import CliRunner
from common import Written, heading, ratio, row


def table(header: tuple[str, ...], *rows: dict[str, object]) -> str:
    """A table as programs write it; cells that do not matter are dashes."""
    lines = [row([each.get(name, "-") for name in header]) for each in rows]
    return "\n".join(["x86_64, 2 cores.", "", *heading(header).split("\n"), *lines]) + "\n"


def step_row(optimizer: str, where: str, against: str, factor: float) -> dict[str, object]:
    found: dict[str, object] = {"optimizer": optimizer, "where": where, "against": against, "step": "inner"}
    found["theirs / ours"] = ratio(factor)
    return found | {"theirs / ours, processor time": factor, "ours / fused AdamW, processor time": 1 / factor}


TABLES = {
    "step": table(
        step.HEADER,
        step_row("adamw", "small", "torch AdamW, foreach", 1.5),
        step_row("adamw", "small", "torch AdamW, fused", 0.95),
        step_row("came", "small", "came_pytorch", 0.8),
        step_row("lamb", "zero2 x2", "DistributedLamb", 3.0),
        step_row("lamb", "tp2+zero2 x4", "DistributedLamb", 11.9),
        {**step_row("came", "tp2 x2", "DistributedCAME", 1.0), "theirs / ours": "-", "theirs, ms": "crashes: X: a | b"},
    ),
    "tensors": table(
        tensors.HEADER,
        {"optimizer": "came", "tensors": 75, "processor ms": 10.0},
        {"optimizer": "came", "tensors": 750, "processor ms": 14.0, "processor time": 1.4},
        {"optimizer": "torch AdamW, fused", "tensors": 750, "processor ms": 14.0, "processor time": 9.0},
    ),
    "memory": table(
        memory.HEADER,
        {"optimizer": "adamw", "mesh": "zero2 x2", "measured / estimate, between steps": ratio(1.0)},
        {"optimizer": "came", "mesh": "zero2 x2", "measured / estimate, between steps": ratio(1.02)},
    ),
    "traffic": table(
        traffic.HEADER,
        {
            "method": "BAdam",
            "bytes / its bytes": ratio(0.1),
            "expected at most": 0.15,
            "step / its step, processor time": 0.2,
        },
    ),
    "scale": table(scale.HEADER, {"optimizer": "adamw", "bookkeeping / state": ratio(0.001, 4), "construction, s": 11}),
}


def test_targets_are_judged_by_the_figures() -> None:
    written = {name: Written.read(text) for name, text in TABLES.items()}
    found = {cells[0]: cells[1:] for cells in targets.judged(written)}
    verdicts = {target.table + target.figures.__name__: found.get(target.text) for target in targets.TARGETS}
    assert verdicts["step_on_one_process"] == ["**not met**", "1 of 2 miss it: came_pytorch small 0.8"]
    assert verdicts["step_near_fused"] == ["met", "all 1: small 1.053"]
    # What crashes on their side is no figure.
    assert verdicts["step_on_ranks"] == ["**not met**", "1 of 2 miss it: lamb tp2+zero2 x4 11.9"]
    assert verdicts["tensors_tenths"] == ["met", "all 1: came 1.4"]
    assert verdicts["traffic_blocks"] == ["**not met**", "1 of 2 miss it: step 0.2"]
    assert verdicts["traffic_low_rank"] == ["not measured", "-"]
    assert verdicts["compiled_compiled"] is None
    told = [cells for text, cells in found.items() if "estimate" in text or "constructed" in text]
    assert told == [["**not met**", "1 of 2 miss it: came zero2 x2 1.02"], ["**not met**", "1 of 1 miss it: adamw 11"]]


def test_every_target_reads_columns_that_its_program_has() -> None:
    programs = {name: Path(section.command[0]).stem for name, section in page.SECTIONS.items()}
    headers = {name: importlib.import_module(program).HEADER for name, program in programs.items()}
    for target in targets.TARGETS:
        empty = Written("", "", (dict.fromkeys(headers[target.table], "0"),))
        target.judged(empty)


def test_page_is_made_of_the_tables_that_are_there(tmp_path: Path) -> None:
    for name, text in TABLES.items():
        (tmp_path / f"{name}.md").write_text(text)
    (tmp_path / "switch.md").write_text(table(("mesh", "switch / step")))
    output = tmp_path / "docs" / "page.md"
    arguments = ["--keep", "--tables", str(tmp_path), "--output", str(output)]
    outcome = CliRunner().invoke(page.main, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    text = output.read_text()
    titles = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert titles[1:] == [page.SECTIONS[name].title for name in page.SECTIONS if name in TABLES]
    for name, written in TABLES.items():
        assert written.split("\n\n", 1)[1].strip() in text, name
        assert f"python benchmarks/{page.SECTIONS[name].command[0]}" in text
    links = re.findall(r"\]\((pictures/\w+\.png)\)", text)
    assert [Path(link).stem for link in links] == ["step", "tensors", "memory"]
    assert all((output.parent / link).read_bytes().startswith(b"\x89PNG") for link in links)


def test_page_goes_on_after_a_program_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scale.md").write_text(TABLES["scale"])
    monkeypatch.setitem(page.SECTIONS, "switch", page.Section("Switches", ("no_such_program.py",), ""))
    arguments = ["--only", "switch", "--tables", str(tmp_path), "--output", str(tmp_path / "page.md")]
    outcome = CliRunner().invoke(page.main, arguments)
    assert outcome.exit_code == 1
    assert "switch failed" in outcome.output
    assert "## One rank of a large job" in (tmp_path / "page.md").read_text()


def test_one_section_anew_keeps_the_others_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a new clone, which has the page and no tables."""
    before = {name: Written.read(text) for name, text in TABLES.items()}
    output = tmp_path / "page.md"
    output.write_text(page.assembled(before, tmp_path / "pictures"))
    assert page.tables_of(output.read_text()) == before
    changed = TABLES["scale"].replace("x86_64", "another machine")
    monkeypatch.setattr(page, "run", lambda name, folder: (folder / f"{name}.md").write_text(changed))
    arguments = ["--only", "scale", "--tables", str(tmp_path), "--output", str(output)]
    CliRunner().invoke(page.main, arguments, catch_exceptions=False)
    assert page.tables_of(output.read_text()) == before | {"scale": Written.read(changed)}


def test_page_without_tables_says_what_to_do(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(
        page.main, ["--keep", "--tables", str(tmp_path), "--output", str(tmp_path / "page.md")]
    )
    assert outcome.exit_code == 2
    assert "Run without --keep" in outcome.output
