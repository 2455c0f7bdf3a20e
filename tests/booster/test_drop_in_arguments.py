"""Every constructor argument of ColossalAI's plugins has its effect under ours, or is refused or named without one."""

from __future__ import annotations

import inspect
import re
from typing import Any

import drop_in_argument_cases as cases
import pytest
from colossalai.booster.plugin import HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin

from colossal_bcd.testing import run_ranks

STOCK: dict[str, Any] = {"zero": LowLevelZeroPlugin, "hybrid": HybridParallelPlugin, "ddp": TorchDDPPlugin}


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    return run_ranks(2, cases.everything)


@pytest.mark.parametrize("plugin", STOCK)
def test_argument_table_is_complete(plugin: str) -> None:
    asked = set(inspect.signature(STOCK[plugin]).parameters)
    assert asked == set(cases.EFFECTS[plugin]) | set(cases.REFUSALS[plugin])


def test_argument_that_is_accepted_has_its_effect(seen: list[dict[str, Any]]) -> None:
    """`use_fp8`, options of torch's DDP at stage 0 and pipeline styles were accepted, and ignored or failed later."""
    assert [rank["effects"] for rank in seen] == [{}, {}]


def test_argument_that_is_refused_says_what_to_set(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        for plugin, refusals in cases.REFUSALS.items():
            for argument, (_, message) in refusals.items():
                assert re.match(message, rank["refusals"][plugin, argument]), rank["refusals"][plugin, argument]


def test_argument_without_effect_is_named_once_by_rank_0(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["said"] == [want for *_, want in cases.SAID]
    assert seen[1]["said"] == [[] for _ in cases.SAID]
