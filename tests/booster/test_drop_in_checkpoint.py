"""In the place of ColossalAI's plugins: what is saved is loaded, and training goes on from it bit by bit."""

from __future__ import annotations

import drop_in_checkpoint_cases as cases
import pytest

from colossal_bcd.testing import run_ranks


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_drop_in_checkpoints_hold_what_the_stock_tests_assert(num_ranks: int) -> None:
    """Models, optimizers and adapters, in one file and in shards; three ranks divide no weight evenly."""
    assert all(run_ranks(num_ranks, cases.everything))
