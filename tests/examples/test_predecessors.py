"""Originals beside ours in the programs, and what a step's figures say."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import methods
import predecessors
import pytest
import torch
from instruct import Instruct, main
from interrupt import stop_request
from predecessors import ORIGINALS, refuse_without_original
from records import DataError
from support.errors import largest_error
from support.signs import signed_svd
from test_glue import Glue, flags_of, sentiment
from test_instruct import TOY, records

from colossal_bcd import Lamb
from colossal_bcd.testing import run_ranks

RATES = {"came": "1e-3"}
"""CAME's are smaller: at 1e-2 its losses jump, and a difference of rounding grows a thousandfold in a step."""


def run(folder: str, *flags: str) -> dict[str, Any]:
    """Results and figures of a run in the folder."""
    given = [*TOY, "--answers", "0", "--output", folder, *flags]
    Instruct(**main.make_context("instruct.py", given).params).train()
    torch.distributed.barrier()  # the first rank has written
    return {name: json.loads(Path(folder, f"{name}.json").read_text("utf-8")) for name in ("results", "figures")}


def both(method: str, precision: str, folder: str, data: str) -> list[list[float]]:
    """Losses of ours and of the original."""
    if method == "lamb":
        # ColossalAI's default is not to debias the moments; ours has this form, too.
        methods.Lamb = partial(Lamb, bias_correction=False)  # type: ignore[misc, assignment]
    flags = ["--method", method, "--precision", precision, "--lr", RATES.get(method, "1e-2"), "--steps", "20"]
    found = []
    for implementation in ("ours", "original"):
        # Bases that carry moments over a refresh need their signs, which are LAPACK's in the original.
        with signed_svd() if implementation == "original" else contextlib.nullcontext():
            results = run(f"{folder}/{implementation}", *flags, "--data", data, "--implementation", implementation)
        found.append(list(results["results"]["losses"].values()))
    return found


@pytest.mark.parametrize("method", ORIGINALS)
def test_original_has_the_losses_of_ours(method: str, tmp_path: Path) -> None:
    """Over twenty steps with ten switches or refreshes, within twenty roundings of the first loss, which is 6."""
    ours, original = run_ranks(1, both, method, "fp32", str(tmp_path), str(records(tmp_path)))[0]
    assert ours[0] - ours[-1] > 2
    assert largest_error(torch.tensor(ours), torch.tensor(original)) < 20 * 2**-24 * 6


def test_original_of_badam_has_the_losses_of_ours_in_bf16(tmp_path: Path) -> None:
    """Until a master that lies on a tie is rounded to another side."""
    ours, original = run_ranks(1, both, "badam", "bf16", str(tmp_path), str(records(tmp_path)))[0]
    assert ours[0] - ours[-1] > 2
    assert ours[:10] == original[:10]
    assert largest_error(torch.tensor(ours), torch.tensor(original)) < 2**-8


def of_glue(folder: str, data: str) -> list[list[float]]:
    found = []
    for implementation in ("ours", "original"):
        output = f"{folder}/{implementation}"
        flags = "--toy --task sst2 --precision fp32 --use_block_optim --switch_every 3 --lr 1e-2 --steps 20 --save"
        given = [*flags.split(), "--data", data, "--implementation", implementation, "--output", output]
        Glue(**flags_of(*given)).train()
        assert list(Path(output, "model").glob("*.safetensors"))
        results = json.loads(Path(output, "results.json").read_text("utf-8"))
        found.append([*results["losses"].values(), *results["held_out"]["20"].values()])
    return found


def test_original_trains_the_blocks_of_another_program(tmp_path: Path) -> None:
    """With the papers' blocks and dropout."""
    ours, original = run_ranks(1, of_glue, str(tmp_path), str(sentiment(tmp_path / "data")))[0]
    assert len(ours) == 22
    assert largest_error(torch.tensor(ours), torch.tensor(original)) < 1e-5


def stopped(folder: str, data: str) -> list[str]:
    """What a run of an original leaves that was asked to stop before its first step."""
    stop_request.received = True
    results = run(folder, "--data", data, "--steps", "4", "--precision", "fp32", "--implementation", "original")
    assert results["results"]["losses"].keys() == {"1"}
    return sorted(path.name for path in Path(folder).iterdir())


def test_an_original_that_is_stopped_leaves_no_checkpoint(tmp_path: Path) -> None:
    """BAdam's would go on with another block."""
    found = run_ranks(1, stopped, str(tmp_path / "run"), str(records(tmp_path)))[0]
    assert found == ["figures.json", "results.json"]


def refused(*flags: str) -> str:
    given = main.make_context("instruct.py", ["--implementation", "original", *flags]).params
    with pytest.raises(DataError) as raised:
        refuse_without_original(given)
    return str(raised.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method golore", "is of badam, galore, came, adafactor, lamb, adamw, got golore. Leave it out."),
        ("--plugin fsdp", "got 1 ranks and --plugin fsdp, expected one process and no plugin"),
        ("--method came", "got --precision bf16, in which that of came rounds what ours does not"),
        ("--resume", "got --resume, but originals write no checkpoints"),
    ],
)
def test_what_originals_lack_is_refused(flags: str, message: str) -> None:
    assert message in run_ranks(1, refused, *flags.split())[0]


def test_original_on_two_ranks_is_refused() -> None:
    assert all("got 2 ranks and --plugin zero" in told for told in run_ranks(2, refused))


def test_a_package_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predecessors.importlib.util, "find_spec", lambda name: None)
    options = methods.Options(lr=1.0, steps=1, period=1, implementation="original")
    for method, package in (("badam", "badam"), ("galore", "galore-torch"), ("came", "came-pytorch")):
        with pytest.raises(DataError, match=rf"the package {package} is not installed.* pip install {package}\."):
            methods.optimizer_of(method, torch.nn.Linear(1, 1), options)


GENERATOR = torch.get_rng_state().numel()
"""Bytes of a generator's state: ColossalAI keeps some for the dropout of tensor-parallel layers."""


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(1, "--precision fp32"), (2, ""), (2, "--plugin fsdp"), (2, "--plugin hybrid --tp 2")],
)
def test_formula_counts_the_tensors_of_a_step(ranks: int, flags: str, tmp_path: Path) -> None:
    """But for tables of positions and padding, less than a kilobyte; and a block sends less than all weights."""
    common = ["--data", str(records(tmp_path)), "--steps", "4", *flags.split()]
    found = {
        name: run_ranks(ranks, run, str(tmp_path / name), "--method", name, *common)[0]["figures"]
        for name in ("badam", "adamw", "galore")
    }
    for name, figures in found.items():
        more = figures["step_bytes"] - figures["step_bytes_by_formula"]
        assert 0 <= (more % GENERATOR if "--tp" in flags else more) < 1024, name
        assert figures["peak_bytes"] > figures["step_bytes"]
    assert found["badam"]["step_bytes"] < found["adamw"]["step_bytes"]
    sent = {name: figures["sent_bytes_per_step"] for name, figures in found.items()}
    assert (sent["badam"] < sent["adamw"]) is (ranks > 1)
    assert (sent["adamw"] > 0) is (ranks > 1)
