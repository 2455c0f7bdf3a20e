"""Blocks of LoRA adapters on sharded weights."""

from __future__ import annotations

import fsdp_adapter_cases as cases

from colossal_bcd.testing import run_ranks


def test_blocks_of_adapters_are_bit_equal_to_one_process() -> None:
    want = {"losses": True, "weights": True, "adapters": True}
    assert run_ranks(2, cases.run) == [want, want]
