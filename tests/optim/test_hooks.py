"""Hooks of a step run once, whatever was constructed before."""

import pytest
from hook_cases import BUILDERS, counts

from colossal_bcd.testing import run_ranks


@pytest.mark.parametrize("order", ["ascending", "descending", "order 1", "order 2"])
def test_step_hooks_run_once_in_any_order_of_construction(order):
    """torch runs hooks in the `step` of every class that was constructed: GaLoreAdafactor's called Adafactor's."""
    (found,) = run_ranks(1, counts, order)
    assert found.keys() == BUILDERS.keys()
    wrong = {name: runs for name, runs in found.items() if runs != [["pre", "post"]] * 2}
    assert wrong == {}
