"""BREAD's corrections under the plugins give the losses of a plain loop on one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import block_cases
import bread_cases
import models
import plain_bread
import pytest
import torch
from block_cases import LAYERS, PERIOD
from support.errors import largest_error
from test_block_plugins import SUM_BOUND, worst

from colossal_bcd.testing import run_ranks

STEPS = PERIOD * (LAYERS + 1)
LR = {"adamw": 1e-3, "sgd": 0.05}


def plain(num_ranks: int, different: bool, base: str, dtype: torch.dtype, **kwargs: Any) -> list[list[float]]:
    accumulate = kwargs.get("accumulate", 1)
    layers, order = kwargs.pop("layers", LAYERS), kwargs.pop("order", [i % LAYERS for i in range(LAYERS + 1)])
    return plain_bread.train(
        models.llama(layers=layers).to(dtype).train(),
        [f"model.layers.{i}." for i in range(layers)],
        order,
        PERIOD,
        lambda step: [block_cases.batch_of(step, part, different) for part in range(num_ranks * accumulate)],
        lambda masters: block_cases.base_optimizer(base, masters),
        models.loss,
        lr=2 * LR[base],
        **kwargs,
    )


def check(results: list[dict[str, Any]], want: list[list[float]], bound: float) -> None:
    assert all(result["replicas"] for result in results), "replicas differ"
    assert worst([{**result, "frozen": True} for result in results], want) <= bound


BIT_IDENTICAL: dict[str, tuple[int, bool, str, dict[str, Any], str, str]] = {
    "zero1-1": (1, True, "zero", {"stage": 1}, "sgd", "all"),
    "zero1-2": (2, True, "zero", {"stage": 1}, "sgd", "all"),
    "zero2-2": (2, True, "zero", {"stage": 2}, "sgd", "all"),
    "zero2-2-partial": (2, True, "zero", {"stage": 2}, "sgd", "partial"),
    "zero2-2-small-buckets": (2, True, "zero", {"stage": 2, "reduce_bucket_size_in_m": 0}, "sgd", "all"),
    "zero1-2-no-overlap": (2, True, "zero", {"stage": 1, "overlap_communication": False}, "sgd", "all"),
    "zero1-2-overlap-allgather": (2, True, "zero", {"stage": 1, "overlap_allgather": True}, "sgd", "all"),
    "zero2-2-sign": (2, True, "zero", {"stage": 2}, "sign", "all"),
    "zero2-2-lion": (2, True, "zero", {"stage": 2}, "lion", "partial"),
    "zero1-2-momentum": (2, True, "zero", {"stage": 1}, "momentum", "all"),
    "zero2-4-same-batch": (4, False, "zero", {"stage": 2}, "sgd", "all"),
    "hybrid-zero0-2": (2, True, "hybrid", {"tp_size": 1, "pp_size": 1, "zero_stage": 0}, "sgd", "all"),
    "ddp-2": (2, True, "ddp", {}, "sign", "all"),
}


@pytest.mark.parametrize("case", BIT_IDENTICAL)
def test_correction_losses_are_bit_identical(case: str) -> None:
    """The loop averages gradients as the wire does, in bfloat16, and computes updates in float32."""
    num_ranks, different, plugin, options, rule, mode = BIT_IDENTICAL[case]
    if plugin != "ddp":
        options = {**options, "precision": "bf16"}
    block = bread_cases.options_of(rule, sgd_mode=mode)
    results = run_ranks(num_ranks, partial(bread_cases.losses, block=block), plugin, options, STEPS, different)
    check(results, plain(num_ranks, different, "adamw", torch.bfloat16, rule=rule, mode=mode), 0)


WITHIN_ROUNDING: dict[str, tuple[int, bool, dict[str, Any], str, str]] = {
    "tp2": (2, False, {"tp_size": 2, "zero_stage": 0}, "sgd", "all"),
    "tp2-zero2": (4, True, {"tp_size": 2, "zero_stage": 2}, "sgd", "all"),
    "tp2-zero2-partial": (4, True, {"tp_size": 2, "zero_stage": 2}, "momentum", "partial"),
    "zero2-4": (4, True, {"tp_size": 1, "zero_stage": 2}, "sgd", "all"),
    "zero1-1-galore": (1, False, {"tp_size": 1, "zero_stage": 1}, "galore", "all"),
    "zero2-2-galore": (2, True, {"tp_size": 1, "zero_stage": 2}, "galore", "partial"),
    "tp2-galore": (2, False, {"tp_size": 2, "zero_stage": 0}, "galore", "all"),
    "tp2-zero2-galore": (4, True, {"tp_size": 2, "zero_stage": 2}, "galore", "all"),
}


@pytest.mark.parametrize("case", WITHIN_ROUNDING)
def test_correction_losses_within_rounding(case: str) -> None:
    num_ranks, different, options, rule, mode = WITHIN_ROUNDING[case]
    options = {**options, "pp_size": 1, "precision": "fp32"}
    run = partial(bread_cases.losses, block=bread_cases.options_of(rule, sgd_mode=mode))
    results = run_ranks(num_ranks, run, "hybrid", options, STEPS, different, "sgd")
    data_ranks = max(result["rank"] for result in results) + 1
    # Corrections move everything, some ten times as far as one block; momentum adds rounding to bfloat16, which
    # differences of the last bit of float32 can turn into one bit of it, 2^-8 of a tenth of the movement.
    bound = 10 * SUM_BOUND + (0.01 * 2**-8 if rule == "momentum" else 0)
    check(results, plain(data_ranks, different, "sgd", torch.float32, rule=rule, mode=mode), bound)


@pytest.mark.parametrize(
    ("stage", "no_sync", "declared"), [(1, True, True), (1, True, False), (1, False, True), (2, False, True)]
)
def test_correction_accumulation_equals_loop(stage: int, no_sync: bool, declared: bool) -> None:
    """One update per step, from a sum in bfloat16; `no_sync` declares micro-batches by itself."""
    block = bread_cases.options_of("sgd", accumulation_steps=2 if declared else 1)
    case = partial(bread_cases.losses, accumulate=2, no_sync=no_sync, block=block)
    results = run_ranks(2, case, "zero", {"stage": stage, "precision": "fp32"}, STEPS, True, "sgd")
    check(results, plain(2, True, "sgd", torch.float32, accumulate=2), 10 * SUM_BOUND)


def test_correction_is_not_clipped() -> None:
    options = {"tp_size": 2, "pp_size": 1, "zero_stage": 2, "precision": "fp32", "max_norm": 0.05}
    case = partial(bread_cases.losses, block=bread_cases.options_of("sgd"))
    results = run_ranks(4, case, "hybrid", options, STEPS, True, "sgd")
    check(results, plain(2, True, "sgd", torch.float32, max_norm=0.05), 10 * SUM_BOUND)


@pytest.mark.parametrize(
    ("num_ranks", "tp", "ranges"), [(2, 1, None), (2, 1, [(0, 4)]), (4, 2, None)], ids=["pp2", "pp2-one", "pp2-tp2"]
)
def test_correction_under_pipelines_makes_one_update_a_step(num_ranks: int, tp: int, ranges: Any) -> None:
    """Micro-batches of a pipeline are in flight together: weights may change when all are back only."""
    options = {"tp_size": tp, "pp_size": 2, "zero_stage": 1, "precision": "fp32", "num_microbatches": 2}
    block = bread_cases.options_of("sgd", block_ranges=ranges)
    results = run_ranks(num_ranks, partial(bread_cases.pipeline, block=block), options, STEPS, 4)
    order = [(0, 2), (1, 3)] * 2 if ranges is None else [0, 1, 2, 3]
    want = plain_bread.train(
        models.llama(layers=4),
        [f"model.layers.{i}." for i in range(4)],
        order,
        PERIOD,
        lambda step: list(block_cases.batch_of(step, 0, different=True).split(1)),
        lambda masters: block_cases.base_optimizer("sgd", masters),
        models.loss,
        lr=0.1,
        accumulate=2,
    )
    ends = [result for result in results if result["last"]]
    means = [sum(want[step]) / 2 for step in range(STEPS)]
    assert ends
    for end in ends:
        assert largest_error(list(end["losses"]), means) <= 10 * SUM_BOUND


@pytest.mark.parametrize(
    ("num_ranks", "plugin", "options", "bad"),
    [(2, "zero", {"stage": 2}, None), (4, "hybrid", {"tp_size": 2, "pp_size": 1, "zero_stage": 1}, 1)],
    ids=["zero2-2", "tp2-zero1"],
)
def test_correction_overflow_skips_the_bucket_on_all_ranks(num_ranks: int, plugin: str, options: Any, bad: Any) -> None:
    """An infinite gradient on one rank: its bucket and the step are skipped, and the loss scale halves."""
    extra = {"precision": "fp16", "initial_scale": 2.0**8, "hysteresis": 1}
    size = {"reduce_bucket_size_in_m": 0} if plugin == "zero" else {"zero_bucket_size_in_m": 0}
    for result in run_ranks(num_ranks, bread_cases.overflow, plugin, {**options, **extra, **size}, bad):
        assert result["finite"]
        assert result["replicas"]
        assert result["bad"] not in result["moved"]
        assert "lm_head.weight" in result["moved"], "what came before the overflow stays"
        assert not result["moved"] & result["active"]
        assert (result["steps"], result["scale"]) == (0, 0.5)


@pytest.mark.parametrize("rule", ["sgd", "descent"])
def test_correction_undoes_the_loss_scale(rule: str) -> None:
    options = {"stage": 1, "precision": "fp16", "initial_scale": 2.0**8}
    assert run_ranks(1, bread_cases.scaled, options, rule) == [0.0]


def test_correction_by_an_optimizer_skips_buckets_with_an_overflow() -> None:
    options = {"tp_size": 2, "pp_size": 1, "zero_stage": 1, "precision": "fp16", "initial_scale": 2.0**8}
    options |= {"hysteresis": 1, "zero_bucket_size_in_m": 0}
    for result in run_ranks(4, bread_cases.overflow, "hybrid", options, 1, "galore"):
        assert result["finite"]
        assert result["replicas"]
        assert result["bad"] not in result["moved"]
        assert "lm_head.weight" in result["moved"], "what came before the overflow stays"
        assert (result["steps"], result["scale"]) == (0, 0.5)


def test_correction_by_an_optimizer_asks_once_a_bucket() -> None:
    """GaLore's rounds over tp: two all-reduces a bucket, and at a refresh the gradients to owners and bases back."""
    options = {"tp_size": 2, "pp_size": 1, "zero_stage": 0, "precision": "fp32"}
    sgd, galore = (run_ranks(2, bread_cases.calls, options, rule)[0] for rule in ("sgd", "galore"))
    buckets = 2  # above and below the active block, which comes between them in model order
    assert galore[0] - sgd[0] <= 2 * buckets
    assert galore[1] - sgd[1] <= 6 * buckets


@pytest.mark.parametrize("stage", [1, 2])
def test_correction_collectives_are_a_matter_of_bytes(stage: int) -> None:
    """One bucket more for everything that is corrected; without corrections not one collective more than before."""
    options = {"stage": stage, "precision": "bf16"}
    badam = run_ranks(2, bread_cases.traffic, options, {})[0]
    bread = run_ranks(2, bread_cases.traffic, options, bread_cases.options_of("sgd"))[0]
    small = run_ranks(2, bread_cases.traffic, {**options, "reduce_bucket_size_in_m": 0}, bread_cases.options_of("sgd"))[
        0
    ]
    extra = sum(bread["calls"].values()) - sum(badam["calls"].values())
    # Corrected buckets lie above and below the active block in model order.
    assert 1 <= extra <= 2
    assert sum(small["calls"].values()) > sum(bread["calls"].values()) + 10


@pytest.mark.parametrize("stage", [1, 2])
def test_correction_peak_memory_is_that_of_badam(stage: int) -> None:
    """Weights, masters, state, gradients and buckets, at the largest in a step; all gradients would be 2 bytes each."""
    options = {"stage": stage, "precision": "bf16", "reduce_bucket_size_in_m": 0}
    badam = run_ranks(2, bread_cases.traffic, options, {}, 256)[0]["peak"]
    bread = run_ranks(2, bread_cases.traffic, options, bread_cases.options_of("sgd"), 256)[0]["peak"]
    assert bread <= 1.05 * badam, f"{bread} bytes, BAdam {badam}"


@pytest.mark.parametrize("stage", [1, 2])
def test_correction_with_gradients_that_only_some_ranks_have(stage: int) -> None:
    assert run_ranks(2, bread_cases.missing_gradients, stage) == [True, True]


@pytest.mark.parametrize("stage", [1, 2])
def test_correction_refuses_a_second_backward_on_every_rank(stage: int) -> None:
    for message in run_ranks(2, bread_cases.refused_second_backward, stage):
        assert "the engine got gradient number 2 since the last step, expected 1" in message


@pytest.mark.parametrize(("mode", "refused"), [("all", True), ("disabled", False)])
def test_correction_refuses_sequence_parallelism(mode: str, refused: bool) -> None:
    for message in run_ranks(2, bread_cases.refused_sequence_parallelism, mode):
        assert ("sgd_mode: got 'all' with sequence parallelism ('split_gather')" in message) == refused
        assert refused or message == "no error"


@pytest.mark.parametrize("stage", [1, 2])
def test_correction_of_fewer_micro_batches_than_declared(stage: int) -> None:
    # The last of two declared ones is added in float32, of four declared ones in bfloat16.
    assert max(run_ranks(2, bread_cases.partial_accumulation, stage)) < 1e-3
