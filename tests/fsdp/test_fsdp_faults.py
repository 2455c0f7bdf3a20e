"""Ranks that die or stall: the others end with an error that names the round, as under the plugins."""

from __future__ import annotations

import time
from pathlib import Path

import fsdp_fault_cases as cases
import pytest

from colossal_bcd.testing import RankError, run_ranks

ROUNDS = ("gather of weights", "average of gradients", "norm of gradients", "switch of blocks")
LIMIT = 60.0
"""Seconds within which the survivor has to end."""


@pytest.mark.parametrize(
    ("where", "stop"), [*((where, False) for where in ROUNDS), *((where, True) for where in (ROUNDS[0], ROUNDS[-1]))]
)
def test_survivor_of_a_lost_rank_names_the_round(where: str, stop: bool, tmp_path: Path) -> None:
    with pytest.raises(RankError) as error:
        run_ranks(2, cases.lost, where, str(tmp_path), stop)
    assert time.time() - float((tmp_path / "died").read_text()) < LIMIT
    assert f"rank 0, {where}: another rank died, or did not come within the time limit" in str(error.value)
