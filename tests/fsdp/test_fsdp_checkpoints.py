"""Runs on sharded weights go on in the middle of a block: bit for bit on the same mesh, and on any other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import fsdp_checkpoint_cases as cases
import pytest
import torch
from fsdp_block_cases import Case
from support.errors import largest_error

from colossal_bcd.testing import run_ranks

BF16, F64 = torch.bfloat16, torch.float64
EXACT = {
    "adamw": Case(dtype=BF16, options={"residual": "keep"}),
    "eight bits": Case(dtype=BF16, options={"residual": "keep", "residual_bits": 8}, base="our adamw"),
    "float32": Case(max_norm=0.5),
    "came": Case(dtype=BF16, base="came"),
    "bread": Case(dtype=BF16, rule="momentum"),
    "importance": Case(dtype=BF16, mode="importance"),
    "kept": Case(prefixes=Case().prefixes, options={"active_modules": ["model.norm."]}, dtype=BF16),
}
MOVED = {
    "sgd": Case(dtype=F64, base="sgd"),
    "came": Case(dtype=F64, base="came"),
    "bread": Case(dtype=F64, base="sgd", rule="galore"),
    "importance": Case(dtype=F64, base="sgd", mode="importance"),
}


WAYS = ("files", "torch")


@pytest.mark.parametrize("way", WAYS)
def test_a_run_on_the_same_mesh_goes_on_bit_for_bit(tmp_path: Path, way: str) -> None:
    straight, _ = run_ranks(2, cases.save, tmp_path, EXACT, way)
    resumed, _ = run_ranks(2, cases.load, tmp_path, EXACT, way)
    for name, want in straight.items():
        assert resumed[name]["losses"] == want["losses"], name
        assert all(map(torch.equal, resumed[name]["weights"], want["weights"])), name


@pytest.fixture(scope="module", params=WAYS)
def on_three(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    folder = tmp_path_factory.mktemp("three")
    return request.param, folder, run_ranks(3, cases.save, folder, MOVED, request.param)[0]


@pytest.mark.parametrize(("num_ranks", "mesh"), [(1, "fsdp"), (2, "fsdp"), (4, "hsdp"), (4, "tp2"), (8, "hsdp_tp2")])
def test_a_run_of_three_ranks_goes_on_on_other_meshes(on_three: Any, num_ranks: int, mesh: str) -> None:
    way, folder, straight = on_three
    moved = {name: dataclasses.replace(case, mesh=mesh) for name, case in MOVED.items()}
    resumed = run_ranks(num_ranks, cases.load, folder, moved, way)[0]
    for name, want in straight.items():
        assert largest_error(resumed[name]["losses"], want["losses"]) <= 1e-11, name
        assert largest_error(resumed[name]["weights"], want["weights"]) <= 1e-11, name


def test_ranks_without_values_take_no_state_for_the_same_everywhere() -> None:
    """Empty moments of weights of several shapes are alike: files had them by rank, for this number of ranks alone."""
    assert run_ranks(3, cases.kinds_of_empty_ranks) == [{"elementwise"}] * 3


def test_torchs_checkpoint_of_another_block_is_refused_without_resume_from(tmp_path: Path) -> None:
    for found in run_ranks(2, cases.without_resume_from, tmp_path):
        assert "Checkpointable(engine, resume_from=checkpoint_id)" in found["less"]
        assert "Missing key" in found["other"]
        assert "the state of 0 optimizers with blocks" in found["foreign"]
        assert found["steps"] == 0
