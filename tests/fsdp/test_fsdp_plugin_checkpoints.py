"""Runs under ZeRO go on on sharded weights, and the other way round."""

from __future__ import annotations

from pathlib import Path

import fsdp_checkpoint_cases as sharded
import fsdp_plugin_checkpoint_cases as plugins
import torch
from fsdp_block_cases import Case

from colossal_bcd.testing import run_ranks

CASES = {
    "adamw": Case(dtype=torch.bfloat16, options={"residual": "keep"}),
    "came": Case(dtype=torch.bfloat16, base="came", rule="momentum"),
}


def test_a_run_under_zero_goes_on_under_fsdp2(tmp_path: Path) -> None:
    straight, _ = run_ranks(2, plugins.save, tmp_path, CASES)
    resumed, _ = run_ranks(2, sharded.load, tmp_path, CASES)
    assert {name: each["losses"] for name, each in resumed.items()} == straight


def test_a_run_under_fsdp2_goes_on_under_zero(tmp_path: Path) -> None:
    straight, _ = run_ranks(2, sharded.save, tmp_path, CASES)
    resumed, _ = run_ranks(2, plugins.load, tmp_path, CASES)
    assert resumed == {name: each["losses"] for name, each in straight.items()}
