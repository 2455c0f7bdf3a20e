"""GaLore under the real plugins, with ZeRO really on."""

from __future__ import annotations

from typing import Any

import galore_plugin_cases
import pytest
import torch
from support.errors import largest_error

from colossal_bcd.testing import run_ranks

CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "zero2-2": (2, "zero", {"stage": 2}),
    "zero1-3": (3, "zero", {"stage": 1}),
    "tp2": (2, "hybrid", {"tp_size": 2, "pp_size": 1, "zero_stage": 0}),
    "tp2-zero2": (4, "hybrid", {"tp_size": 2, "pp_size": 1, "zero_stage": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_galore_plugin_step_equals_one_process(case: str) -> None:
    """With random bases, which are equal bit for bit, the masters differ by float32 rounding alone.

    Each step rounds the weight (below 4 in magnitude) once, and its update (below 0.02) some 64 times: two
    products of rank 4 and Adam's ten operations, over sums of up to 96 values.
    """
    num_ranks, plugin, options = CASES[case]
    # Averages of these gradients are exact in bf16, those of their images are not.
    options = {**options, "communication_dtype": torch.float32}
    reports = run_ranks(num_ranks, galore_plugin_cases.injected, plugin, options, {"svd_method": "random"})
    bound = galore_plugin_cases.STEPS * 2**-24 * (4 + 64 * 0.02 * 96**0.5)
    assert all(report["error"] <= bound for report in reports)
    assert all(report["replicas"] for report in reports)


@pytest.mark.parametrize("rule", ["sgd", "adafactor"])
@pytest.mark.parametrize("case", ["zero2-2", "tp2", "tp2-zero2"])
def test_galore_plugin_step_of_other_rules_equals_one_process(case: str, rule: str) -> None:
    """As above; their updates are below 0.02, too, and have no more operations."""
    num_ranks, plugin, options = CASES[case]
    options = {**options, "communication_dtype": torch.float32}
    bound = galore_plugin_cases.STEPS * 2**-24 * (4 + 64 * 0.02 * 96**0.5)
    for report in run_ranks(num_ranks, galore_plugin_cases.injected, plugin, options, {"svd_method": "random"}, rule):
        assert report["error"] <= bound
        assert report["replicas"]


@pytest.mark.parametrize("case", ["zero2-2", "tp2-zero2"])
def test_galore_plugin_keeps_moments_in_8_bits(case: str) -> None:
    """Blocks begin where a slice does, so that a mesh differs from one process within the quantisation error."""
    num_ranks, plugin, options = CASES[case]
    options = {**options, "communication_dtype": torch.float32}
    given = {"svd_method": "random"}
    for report in run_ranks(num_ranks, galore_plugin_cases.injected, plugin, options, given, "adamw8bit"):
        assert report["codes"] > 0
        assert report["missed"] <= 0.1
        assert report["replicas"]


@pytest.mark.parametrize("case", ["zero2-2", "tp2-zero2"])
def test_galore_plugin_replicas_stay_equal_with_singular_vectors(case: str) -> None:
    num_ranks, plugin, options = CASES[case]
    reports = run_ranks(num_ranks, galore_plugin_cases.injected, plugin, options, {})
    assert all(report["replicas"] for report in reports)


def test_galore_plugin_shards_its_states() -> None:
    whole = run_ranks(1, galore_plugin_cases.injected, "zero", {"stage": 2}, {})[0]["held"]
    parts = [report["held"] for report in run_ranks(2, galore_plugin_cases.injected, "zero", {"stage": 2}, {})]
    assert sum(parts) <= 1.01 * whole
    assert max(parts) <= 0.51 * whole


@pytest.mark.parametrize("rule", ["adamw", "sgd", "adafactor"])
def test_galore_inside_blocks_equals_one_process(rule: str) -> None:
    alone = run_ranks(1, galore_plugin_cases.inside_blocks, 1, None, rule)[0]
    for losses in run_ranks(2, galore_plugin_cases.inside_blocks, 2, None, rule):
        assert largest_error(losses, alone) <= 1e-4
    assert len(set(alone)) == len(alone)
