"""Boosting takes what torch's optimizers take: anything in a param group, and adapters made after the optimizer."""

from __future__ import annotations

import re
from typing import Any

import drop_in_boost_cases as cases
import pytest

from colossal_bcd.testing import run_ranks


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    return run_ranks(2, cases.everything)


def test_param_group_may_hold_anything(seen: list[dict[str, Any]]) -> None:
    """Ranks compared printed addresses, and boosting said that they were given different optimizers."""
    assert [rank["groups"]["same"] for rank in seen] == [dict.fromkeys(cases.PLUGINS, "no error")] * 2


def test_param_groups_that_differ_are_still_found(seen: list[dict[str, Any]]) -> None:
    for what, error in seen[0]["groups"]["other"].items():
        assert error.startswith("boost: the param group 0 of ranks [1] differs from that of rank 0: "), what
    assert seen[0]["groups"]["other"] == seen[1]["groups"]["other"]
    assert "drop_in_boost_cases.scale instead of builtins.print" in seen[0]["groups"]["other"]["function"]


def test_adapters_made_after_the_optimizer_train_as_those_made_before(seen: list[dict[str, Any]]) -> None:
    """KeyError with this package's optimizers; under the hybrid and DDP plugins nothing trained, without a word."""
    for rank in seen:
        for case, (before, after) in rank["lora"].items():
            assert before == after, case
            assert len(set(before)) == 3, case


def test_adapters_that_cannot_train_are_refused(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["errors"] == seen[1]["errors"]
    errors = seen[0]["errors"]
    for plugin in cases.PLUGINS:
        assert re.match(
            r"boost: got a BlockOptimizer without the model's \d+ adapter weights", errors[f"block {plugin}"]
        )
        assert re.match(r"enable_lora: got a bnb_quantization_config on a machine", errors[f"quantized {plugin}"])
