"""ColossalAI's walk-through: every optimizer on every number of ranks, the README's code and output, wrong flags."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import colossalai
import pytest
import torch
import torch.distributed as dist
import tutorial
from docs_cases import blocks
from records import DataError
from test_docs_code import check_command
from tutorial import CLASSES, main, walk

from colossal_bcd.testing import run_ranks

README = Path(tutorial.__file__).with_name("README.md")
PAGE = f"../examples/tutorial/{README.name}"
OURS = {"lamb": "Lamb", "adafactor": "Adafactor", "came": "CAME"}


def walked(output: str, **flags: Any) -> dict[str, Any]:
    """Losses of a run on this rank, and what it has said."""
    given = {"optimizer": "adafactor", "classes": None, "tp": None, "steps": 3, "precision": "fp32", "resume": False}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        losses = walk(**{**given, **flags}, output=Path(output))
    dist.barrier()  # the first rank has written
    return {**losses, "said": said.getvalue().splitlines()}


def every_optimizer(folder: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (name, classes): walked(f"{folder}/{name}-{classes}", optimizer=name, classes=classes)
        for name, found in CLASSES.items()
        for classes in found
    }


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], dict[str, Any]]]:
    return run_ranks(4, every_optimizer, str(tmp_path_factory.mktemp("four")))


ALL = [(name, classes) for name, found in CLASSES.items() for classes in found]


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_every_optimizer_trains_and_goes_on_on_another_mesh(on_four: list[Any], case: tuple[str, str]) -> None:
    found = on_four[0][case]
    assert found["before"][-1] < found["before"][0] - 0.02
    assert found["here"][-1] < found["before"][-1]
    # Moments of 8 bits are quantised anew on other ranks, to 0.71 % of the largest: steps differ by less than 1 %.
    way = found["before"][-1] - found["here"][-1]
    assert found["there"] == pytest.approx(found["here"], abs=way / 100 if case[0] == "galore" else 1e-5)


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_program_says_what_was_cast_to_what(on_four: list[Any], case: tuple[str, str]) -> None:
    name, classes = case
    package, asked = CLASSES[name][classes].split(":")
    asked = f"{package.partition('.')[0]}'s {asked}"
    trained = asked if "compat" in package or name == "adam" else f"colossal_bcd's {OURS[name]}"
    first, *table = on_four[0][case]["said"]
    assert first == f"{asked} is trained as {trained}, tp 2 x zero 2"
    assert re.match(rf"embed_tokens\.weight +{trained.split()[1]} +128x256, dim 0 tp 0/2, flat zero 0/2 ", table[1])
    assert on_four[1][case]["said"] == []


@pytest.mark.parametrize("name", OURS)
def test_colossalais_class_trains_as_that_of_compat(on_four: list[Any], name: str) -> None:
    assert on_four[0][name, "distributed"]["here"] == on_four[0][name, "compat"]["here"]


def test_files_of_four_ranks_go_on_on_two_and_on_one(tmp_path: Path) -> None:
    (four, *_) = run_ranks(4, came, str(tmp_path))
    (two, *_) = run_ranks(2, came, str(tmp_path), True)
    (one,) = run_ranks(1, came, str(tmp_path), True)
    assert two["before"] == pytest.approx(four["here"], abs=1e-5)
    assert one["before"] == pytest.approx(two["here"], abs=1e-5)
    assert [found["said"][0].partition(", ")[2] for found in (four, two, one)] == [
        "tp 2 x zero 2",
        "tp 2 x zero 1",
        "tp 1 x zero 1",
    ]
    assert one["said"][-3].startswith("step 10: loss ")


def came(folder: str, resume: bool = False) -> dict[str, Any]:
    return walked(folder, optimizer="came", resume=resume)


def as_in_the_readme(folder: str) -> list[list[str]]:
    return [
        walked(f"{folder}/bf16", optimizer="lamb", precision="bf16", steps=10)["said"],
        walked(f"{folder}/fp16", precision="fp16", steps=10)["before"],
    ]


def test_output_in_the_readme_is_the_programs(tmp_path: Path) -> None:
    said, losses = run_ranks(4, as_in_the_readme, str(tmp_path))[0]
    # Without the table of `explain`.
    said = [said[0], *(line for line in said if line.startswith(("step", "saved")))]
    ((_, text),) = blocks(PAGE, "text")
    number = re.compile(r"-?\d\.\d{4}")
    lines = [line.replace("tutorial/checkpoints", str(tmp_path / "bf16/checkpoints")) for line in text.splitlines()]
    assert [number.sub("-", line) for line in said] == [number.sub("-", line) for line in lines]
    there, here = ([float(each) for line in every for each in number.findall(line)] for every in (lines, said))
    # bfloat16 rounds sums in the order of the machine's kernels.
    assert here == pytest.approx(there, abs=0.02)
    assert losses.count(losses[0]) - 1 == 2
    assert "(two of ten with `--precision fp16`)" in README.read_text()


def walk_through(folder: str, galore: bool) -> dict[str, Any]:
    """What is there after the README's code, with GaLore's block behind that of step 3, or without."""
    os.chdir(folder)
    colossalai.launch_from_torch = lambda: torch.manual_seed(1024)  # the ranks are there
    imports, launch, model, booster, training, low_rank, checkpoint = blocks(PAGE)
    chosen = [imports, launch, model, *([low_rank] if galore else []), booster, training]
    names: dict[str, Any] = {"__name__": "page"}
    for line, block in chosen if galore else [*chosen, checkpoint]:
        exec(compile("\n" * line + block, "README.md", "exec"), names)
    with torch.no_grad():
        untrained = names["LlamaModel"](names["configuration"])
        start = untrained(torch.ones(1, 100, dtype=torch.int)).last_hidden_state.mean().item()
    found = {"loss": names["loss"].item(), "start": start, "class": type(names["dist_optim"].optim).__name__}
    if not galore:
        pairs = zip(names["model"].module.state_dict().items(), names["other"].module.state_dict().items(), strict=True)
        # Ranks that divide a layer have a part of it: norms are whole.
        found["same"] = [torch.equal(one, two) for (name, one), (_, two) in pairs if "norm" in name]
        found["steps"] = {state["step"] for state in names["other_optim"].optim.state.values()}
    return found


def test_code_of_the_readme_trains_saves_and_loads(tmp_path: Path) -> None:
    for found in run_ranks(4, walk_through, str(tmp_path), False):
        assert found["class"] == "Adafactor"
        assert found["loss"] < found["start"] - 0.5
        assert len(found["same"]) == 5
        assert all(found["same"])
        assert found["steps"] == {10}


def test_galores_code_of_the_readme_trains(tmp_path: Path) -> None:
    for found in run_ranks(2, walk_through, str(tmp_path), True):
        assert found["class"] == "DistGaloreAwamW"
        assert found["loss"] < found["start"] - 0.5


def commands() -> list[str]:
    return [line for _, block in blocks(PAGE, "") for line in block.splitlines()]


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_readme_are_there(line: str) -> None:
    check_command(*line.removeprefix("OMP_NUM_THREADS=1 ").split())


def refused(folder: str) -> list[str]:
    """What is said of flags that do not fit one rank, or the folder."""
    walked(folder)
    found = []
    for flags in ({"tp": 2}, {}, {"optimizer": "came", "resume": True}):
        with pytest.raises(DataError) as raised:
            walked(folder, **flags)
        found.append(str(raised.value))
    return found


def test_flags_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (said,) = run_ranks(1, refused, str(tmp_path))
    folder = tmp_path / "checkpoints"
    assert said == [
        "--tp 2 does not divide 1 ranks and 4 heads. Give 1, 2 or 4 that does.",
        f"{folder} has step 3 of an earlier run. Go on with --resume, or give another --output.",
        f"--resume: {folder} is of --optimizer adafactor, got came. Give the same, or another --output.",
    ]


def test_wrong_flags_are_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, tutorial.__file__, "--optimizer", "galore", "--classes", "single"]
    ended = subprocess.run(
        [*command, "--output", str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == "Error: --classes single: galore has compat alone. Give that."
    assert ended.stderr.count("Error") == 1
    assert ended.stdout == ""


@pytest.mark.parametrize("flags", [["--optimizer", "sgd"], ["--steps", "0"], ["--tp", "0"], ["--classes", "ours"]])
def test_flags_that_there_are_not_are_refused(flags: list[str]) -> None:
    with pytest.raises(click.BadParameter, match=re.escape(repr(flags[1])) + r"|0 is not in the range"):
        main.make_context("tutorial.py", flags)
