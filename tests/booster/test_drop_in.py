"""In the place of ColossalAI's optimizer wrappers: its names with its meaning, or refused with the remedy."""

from __future__ import annotations

import re
from typing import Any

import drop_in_cases as cases
import pytest

from colossal_bcd.testing import run_ranks


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    return run_ranks(2, cases.everything)


@pytest.mark.parametrize("case", cases.PAIRS)
def test_drop_in_has_every_public_name_and_signature(seen: list[dict[str, Any]], case: str) -> None:
    """Most of ColossalAI's names raised AttributeError about private fields: its constructor is not run here."""
    for rank in seen:
        surface = rank["surface"][case]
        assert surface["missing"] == []
        assert surface["signatures"] == []
        assert surface["kinds"]
        for name, error in surface["refused"].items():
            assert re.match(cases.REFUSED[name], error or "nothing was raised"), name


def test_drop_in_refusals_are_all_tripped(seen: list[dict[str, Any]]) -> None:
    tripped = {name for surface in seen[0]["surface"].values() for name in surface["refused"]}
    assert tripped == set(cases.REFUSED)


@pytest.mark.parametrize("case", ["zero-1", "zero-2", "hybrid-zero", "hybrid-amp", "hybrid-naive"])
def test_drop_in_reads_what_the_stock_wrapper_reads(seen: list[dict[str, Any]], case: str) -> None:
    """Masters, padding, gradients whole and in slices, state dicts whole and in shards, step after step."""
    assert [rank[case] for rank in seen] == [[], []]


def test_drop_in_step_hooks_run_around_the_step(seen: list[dict[str, Any]]) -> None:
    want = ["before: True", "after", "before: True"]
    assert [rank["hooks"] for rank in seen] == [{"torch": want, "ours": want, "block": want}] * 2


def test_drop_in_fills_pinned_buffers(seen: list[dict[str, Any]]) -> None:
    assert all(all(rank["pinned"].values()) for rank in seen)


def test_drop_in_no_sync_of_the_model_sends_nothing(seen: list[dict[str, Any]]) -> None:
    want = {"hybrid-naive inside": 0, "hybrid-naive after": 1, "ddp inside": 0, "ddp after": 1}
    assert [rank["no_sync"] for rank in seen] == [want, want]


def test_drop_in_low_level_zero_optimizer_passes_what_the_stock_one_does(seen: list[dict[str, Any]]) -> None:
    """What ColossalAI's own tests of its class assert, with the import changed alone."""
    assert [rank["constructed"] for rank in seen] == [{}, {}]
