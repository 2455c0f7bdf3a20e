"""Adafactor and CAME in blocks and with schedules under the plugins; bytes of their state per rank."""

from __future__ import annotations

import math
from typing import Any

import block_cases
import came_pytorch
import factored_cases
import factored_plugin_cases
import models
import plain_badam
import pytest
import torch
from block_cases import LAYERS, PERIOD
from conformance_cases import Case, Sizes
from support.errors import largest_error
from transformers import optimization

from colossal_bcd.testing import run_ranks

STEPS = PERIOD * (LAYERS + 1)
# On one batch the average of the ranks' gradients is exact.  A step's update then differs by a few dozen roundings of
# float32, and the loss by as much of its movement in that step (below 0.1), plus the rounding of a loss of magnitude 6.
BOUND = 6 * 8 * 2**-24 + 0.1 * STEPS * 64 * 2**-24
BASES: dict[str, Any] = {
    "adafactor": lambda masters: optimization.Adafactor(masters, beta1=0.9, weight_decay=0.1),
    "came": lambda masters: came_pytorch.CAME(masters, lr=1e-3, weight_decay=0.1),
}


@pytest.mark.parametrize("base", BASES)
def test_block_losses_equal_those_of_the_original_on_one_process(base: str) -> None:
    """State is that of the active block alone: counted from 1 after every switch, and none right after one."""
    want = plain_badam.train(
        block_cases.build(dtype=torch.float32).train(),
        [f"model.layers.{i}." for i in range(LAYERS)],
        [i % LAYERS for i in range(LAYERS + 1)],
        PERIOD,
        lambda step: [block_cases.batch_of(step, 0, different=False)],
        BASES[base],
        models.loss,
    )
    for result in run_ranks(2, factored_plugin_cases.block_losses, base, STEPS):
        assert largest_error(list(result["losses"]), [loss for (loss,) in want]) <= BOUND
        assert result["states"] == [set() if (step + 1) % PERIOD == 0 else {step % PERIOD + 1} for step in range(STEPS)]


CASES = {
    "matrix": Case(shape=(1023, 64)),
    "rows": Case(shape=(64, 48), dim=0),
    "columns": Case(shape=(64, 48), dim=1),
    "convolution": Case(shape=(8, 4, 3, 3), dim=0),
    "one row": Case(shape=(1, 64)),
    "vector": Case(shape=(30,)),
}


def expected_bytes(case: Case, sizes: Sizes, zero_rank: int, optimizer: str) -> int:
    """Rows and columns of what lies in this rank's slice, the boundary rows included; 4 bytes each."""
    shard = list(case.shape)
    if case.dim is not None:
        shard[case.dim] //= sizes.tp
    num_values = math.prod(shard)
    length = -(-num_values // sizes.zero)
    start, stop = min(zero_rank * length, num_values), min((zero_rank + 1) * length, num_values)
    moment = length if optimizer == "CAME" else 0
    rms = 1 if optimizer == "Adafactor" else 0
    if len(shard) < 2:
        return 4 * (length + moment + rms)
    rows = {index // shard[-1] for index in range(start, stop)}
    matrices = {index // (shard[-1] * shard[-2]) for index in range(start, stop)}
    # Neither rows nor columns are whole on the rank: one more number per matrix.
    total = len(matrices) if case.dim == len(shard) - 1 and sizes.tp > 1 and sizes.zero > 1 else 0
    factors = len(rows) + len(matrices) * shard[-1] + total
    return 4 * (factors * (2 if optimizer == "CAME" else 1) + moment + rms)


@pytest.mark.parametrize("sizes", [Sizes(2, 2), Sizes(1, 4)], ids=str)
def test_state_bytes_are_those_of_the_ranks_rows_and_columns(sizes: Sizes) -> None:
    for measured in run_ranks(sizes.tp * sizes.zero, factored_cases.state_bytes, sizes, CASES):
        for optimizer in ("Adafactor", "CAME"):
            want = {label: expected_bytes(case, sizes, measured["zero"], optimizer) for label, case in CASES.items()}
            assert measured[optimizer] == want
        rows = 1023 / sizes.zero
        assert measured["Adafactor"]["matrix"] <= 4 * (rows + 2 + 64 + 1), "vectors of other ranks' rows are held"


@pytest.mark.parametrize(
    ("plugin", "made_on"),
    [
        *((plugin, made) for plugin in ("zero", "fsdp") for made in ("ours", "transformers", "engine")),
        ("tp", "transformers"),
    ],
)
def test_adafactor_schedule_gives_the_originals_learning_rates_boosted(plugin: str, made_on: str) -> None:
    """The engine frees gradients in its step, and a cast leaves the schedule with an optimizer that never steps.

    A learning rate is a root mean square of less than 2^14 weights: 32 roundings of float32 are more than it has.
    """
    want = factored_plugin_cases.scheduled_lrs(None, "transformers", 4)
    assert want[0] == [0.25, 0.25]
    assert [lrs[1] for lrs in want[1:]] == pytest.approx([1e-6, 2e-6, 3e-6, 4e-6], rel=1e-4)
    for got in run_ranks(2, factored_plugin_cases.scheduled_lrs, plugin, made_on, 4):
        for lrs, expected in zip(got, want, strict=True):
            assert lrs == pytest.approx(expected, rel=32 * 2**-24)


def test_adafactor_schedule_of_blocks_gives_the_active_weights_learning_rate() -> None:
    for seen in run_ranks(2, factored_plugin_cases.scheduled_lrs_of_blocks, PERIOD + 2):
        for lrs, want in seen:
            assert lrs == pytest.approx([want], rel=32 * 2**-24)


def test_what_the_schedule_finds_is_no_gradient_of_the_next_step() -> None:
    assert run_ranks(2, factored_plugin_cases.missing_after_a_step) == [True, True]
