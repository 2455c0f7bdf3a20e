"""ColossalAI's distributed optimizers without a booster: weights divided by hand, `setup_distributed`, the textbook."""

from __future__ import annotations

import re
from typing import Any

import pytest
import setup_distributed_cases as cases

from colossal_bcd.testing import run_ranks

TP2, ZERO2, BOTH = (2, 1), (1, 2), (2, 2)


@pytest.fixture(scope="module")
def tp2() -> list[dict[str, Any]]:
    return run_ranks(2, cases.on_mesh, *TP2)


def test_setup_distributed_on_shards_equals_textbook(tp2: list[dict[str, Any]]) -> None:
    """Weights that were sharded before the optimizer was made were taken for whole ones with padding."""
    for rank in tp2:
        assert all(rank[f"{name} hand"] <= 1.0 for name in cases.OPTIMIZERS)
        # Neither projection sums over a divided dim, so that not even the order of a sum differs.
        assert rank["galore"] == 0.0


@pytest.mark.parametrize("mesh", [ZERO2, BOTH], ids=["zero2", "tp2-zero2"])
@pytest.mark.parametrize("wrapper", ["ours", "stock"])
def test_setup_distributed_behind_zero_equals_textbook(mesh: tuple[int, int], wrapper: str) -> None:
    for rank in on(mesh):
        assert all(rank[f"{name} {wrapper}"] <= 1.0 for name in cases.OPTIMIZERS)


KEPT: dict[tuple[int, int], list[dict[str, Any]]] = {}


def on(mesh: tuple[int, int]) -> list[dict[str, Any]]:
    """What the ranks of a mesh have seen, started once."""
    if mesh not in KEPT:
        KEPT[mesh] = run_ranks(mesh[0] * mesh[1], cases.on_mesh, *mesh)
    return KEPT[mesh]


def test_setup_distributed_knows_padding_from_values(tp2: list[dict[str, Any]]) -> None:
    assert [rank["padded"] for rank in tp2] == [(10, 4, 16, 8)] * 2


def test_setup_distributed_that_is_missing_is_an_error_before_the_step(tp2: list[dict[str, Any]]) -> None:
    for rank in tp2:
        assert re.search(r"is a shard, expected a whole weight, or a call of setup_distributed", rank["forgotten"])
        assert re.match(r"setup_distributed: parameter \d is a shard .* Pass tp_group", rank["without_group"])
