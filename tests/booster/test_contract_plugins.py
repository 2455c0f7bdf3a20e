"""Every optimizer of other packages under the plugins on two ranks: equal to one process, or refused by name."""

from __future__ import annotations

import re
from typing import Any

import contract_cases
import pytest
from block_net import Net
from foreign_optimizers import CLASSES, UNAVAILABLE, verdict

from colossal_bcd.optim.foreign.contract import CLOSE
from colossal_bcd.testing import run_ranks

NAMES = [name for name in CLASSES if name not in UNAVAILABLE]
QUICK = [name for name in NAMES if name.startswith("torch.")] + NAMES[::6]
"""In `make test`; the others are asked on one process by test_contract.py, and here in `make test-full`."""
BOUND = CLOSE
"""What the trial of halves takes for rounding, as a share of changes, which are below 1 here: AdamS is 2e-6 off, as its
small denominators enlarge the last place in which vectors of other lengths are rounded; nearly all others are exact."""


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, bool], tuple[str, Any]]:
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    asked = (item for item in request.session.items if item.originalname.startswith("test_every_optimizer_under"))
    chosen = [item.callspec.params["name"] for item in asked]
    first, second = run_ranks(2, contract_cases.outcomes, chosen, folder, timeout=1800)
    assert first == second, "ranks agree about what is refused, and hold the same weights"
    return first


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in NAMES]
)
def test_every_optimizer_under_a_plugin_equals_one_process_or_is_refused_by_name(
    name: str, results: dict[tuple[str, str, bool], tuple[str, Any]]
) -> None:
    """`torch.optim.Adagrad` raised KeyError in its first step; what is not element-wise trained wrongly on parts."""
    where = verdict(name, Net(layers=contract_cases.LAYERS, width=5))
    for plugin, in_blocks in contract_cases.CASES:
        kind, value = results[name, plugin, in_blocks]
        right = where in ("everywhere", "cast") or (where == "whole tensors" and plugin in ("hybrid0", "ddp"))
        if not right:
            assert kind == "refused", (plugin, in_blocks, value)
        if kind == "unsaved":
            value, message = value
            assert re.search(rf"state '\w+' of {CLASSES[name].__name__}: .* expected ", message)
        if kind in ("errors", "unsaved"):
            assert all(error <= BOUND for error in value), (plugin, in_blocks, value)
        else:
            assert re.search(rf"{CLASSES[name].__name__}.* expected ", value), value


def test_zero_redundancy_optimizer_is_refused_by_name() -> None:
    """Boosted, it trained nothing, with a vague warning."""
    (said,) = run_ranks(1, contract_cases.redundant)
    assert len(said) == 2
    for message in said:
        assert "ZeroRedundancyOptimizer, which holds another optimizer, a AdamW in its attribute 'optim'" in message
        assert "Take that AdamW itself" in message
