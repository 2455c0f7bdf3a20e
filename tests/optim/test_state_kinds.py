"""State of every kind that optimizers of other packages keep, through files: what was lost was lost in silence.

MADGRAD counts its steps in `optimizer.state["k"]`, which no file had; inner tuples of param groups came back as lists.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import state_kind_cases as cases
import torch
from bitsandbytes_cases import BLOCKS, PERIOD, SAVED, STEPS, gradient
from state_kind_cases import equal

from colossal_bcd.checkpoint.manifest import load_hyper, upgraded
from colossal_bcd.checkpoint.values import decode, encode
from colossal_bcd.testing import run_ranks

CASES = [f"{name} {mesh}" for name, mesh, _ in cases.CASES]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, bool]]]:
    folder = tmp_path_factory.mktemp("kinds")
    return folder, run_ranks(2, cases.saves, str(folder))


def test_state_of_every_kind_comes_back_on_the_same_mesh(saved: Any) -> None:
    for rank in saved[1]:
        assert rank == dict.fromkeys(CASES, True)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_state_of_every_kind_comes_back_on_another_mesh(num_ranks: int, saved: Any) -> None:
    for rank in run_ranks(num_ranks, cases.loads, str(saved[0])):
        assert set(rank) == set(CASES)
        for case, difference in rank.items():
            if case.startswith("part"):
                assert "expected an element-wise one, as its tensors are divided over ranks" in difference, case
            else:
                assert difference == "", case


@pytest.mark.parametrize("name", ["every", "madgrad"])
def test_state_of_every_kind_comes_back_into_a_block_optimizer_on_one_process(name: str, tmp_path: Path) -> None:
    runs = [cases.blocks_of_one_process(name) for _ in range(2)]
    for step in range(SAVED):
        advance(*runs[0], step)
    torch.save(runs[0][1].state_dict(), tmp_path / "state")
    runs[1][0].load_state_dict(runs[0][0].state_dict())
    runs[1][1].load_state_dict(torch.load(tmp_path / "state", weights_only=False))
    for step in range(SAVED, STEPS):
        assert equal(*(run[1].state_dict() for run in runs))
        for run in runs:
            advance(*run, step)
    assert equal(*(run[1].state_dict() for run in runs))


def advance(model: Any, optimizer: Any, step: int) -> None:
    for name, param in model.named_parameters():
        if name.startswith(tuple(BLOCKS[step // PERIOD % len(BLOCKS)])):
            param.grad = gradient(name, tuple(param.shape), step)
    optimizer.step()


@pytest.mark.parametrize("value", [*cases.GROUP.values(), {"#tuple": [1]}, [[]], (), {}, True, 2**70, "#tuple", 1e-320])
def test_values_keep_their_types_through_json(value: Any) -> None:
    assert equal(decode(json.loads(json.dumps(encode(value, "value")))), value)


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0, [b"bytes"], {"x": torch.optim.SGD}])
def test_values_of_other_types_are_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"'hook.*: got a .*take it out before saving"):
        encode(value, "hook")


def test_lists_of_an_old_file_become_the_tuples_that_are_there() -> None:
    manifest = {"version": 2, "groups": [{"hyper": {"betas": [0.8, [0.5, [1]]], "plain": [1, [2]], "d": {"a": [1]}}}]}
    group: dict[str, Any] = {"params": [], "betas": (0.9, (0.9, (2,))), "plain": [0, [1]], "d": {}}
    load_hyper(group, upgraded(manifest)["groups"][0]["hyper"])
    assert equal(group, {"params": [], "betas": (0.8, (0.5, (1,))), "plain": [1, [2]], "d": {"a": [1]}})


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor() -> None:
    rate = torch.tensor(0.5)
    group: dict[str, Any] = {"params": [], "lr": rate}
    for value in (0.25, torch.tensor(0.125)):
        load_hyper(group, {"lr": encode(value, "lr")})
        assert group["lr"] is rate
        assert rate == value
