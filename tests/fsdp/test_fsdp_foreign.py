"""Every optimizer of other packages as base of blocks on sharded weights: equal to one process, or refused by name."""

from __future__ import annotations

import re
from typing import Any

import fsdp_foreign_cases as cases
import pytest
from block_net import Net
from foreign_optimizers import CLASSES, UNAVAILABLE, verdict

from colossal_bcd.optim.foreign.contract import CLOSE
from colossal_bcd.testing import run_ranks

NAMES = [name for name in CLASSES if name not in UNAVAILABLE]
QUICK = [name for name in NAMES if name.startswith(("torch.", "bitsandbytes."))] + NAMES[::6]
"""In `make test`; all are tried in `make test-full`."""


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, tuple[str, Any]]:
    asked = (item for item in request.session.items if item.originalname.startswith("test_every_optimizer_on_rows"))
    first, second = run_ranks(2, cases.outcomes, [item.callspec.params["name"] for item in asked])
    assert first == second, "ranks agree about what is refused, and have the same weights"
    return first


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in NAMES]
)
def test_every_optimizer_on_rows_equals_one_process_or_is_refused_by_name(name: str, results: Any) -> None:
    """`torch.optim.Adafactor` trained on flat rows as if they were vectors, without a word."""
    kind, value = results[name]
    where = verdict(name, Net(layers=cases.LAYERS, width=5))
    # Of what plugins cast, GaLore without a rank is element-wise.
    assert where == "cast" or (kind == "error") == (where == "everywhere"), value
    if kind == "error":
        assert value <= CLOSE
    else:
        assert re.search(rf"{CLASSES[name].__name__}.* expected ", value), value
    if where == "whole tensors" and not name.endswith(".AdamMini"):  # which is refused before: it copies the model
        assert value.startswith("attach: got ")
        assert "Use an optimizer of colossal_bcd" in value
