"""Block coordinate descent under the plugins gives the losses of a plain loop on one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import block_cases
import models
import plain_badam
import pytest
import torch
from block_cases import LAYERS, PERIOD
from support.errors import largest_error

from colossal_bcd.testing import run_ranks

STEPS = PERIOD * (LAYERS + 1)  # one pass over all blocks, and the first block again


def plain(
    num_ranks: int, different: bool, base: str = "adamw", dtype: torch.dtype = torch.bfloat16, **kwargs: Any
) -> list[list[float]]:
    kind, accumulate = kwargs.pop("kind", "llama"), kwargs.get("accumulate", 1)
    tied, blocks, order = kwargs.pop("tied", False), kwargs.pop("blocks", None), kwargs.pop("order", None)
    prefix = "h" if kind == "gpt2" else "model.layers"
    return plain_badam.train(
        block_cases.build(kind, dtype, **({"tied": tied} if tied else {})).train(),
        blocks or [f"{prefix}.{i}." for i in range(LAYERS)],
        order or [i % LAYERS for i in range(LAYERS + 1)],
        PERIOD,
        lambda step: [block_cases.batch_of(step, part, different) for part in range(num_ranks * accumulate)],
        lambda masters: block_cases.base_optimizer(base, masters),
        models.loss,
        **kwargs,
    )


def worst(results: list[dict[str, Any]], want: list[list[float]]) -> float:
    """Largest difference of any rank's losses from the loop's, and every rank must have frozen what is not active."""
    assert all(result["frozen"] for result in results)
    differences = []
    for result in results:
        for got, expected in zip(result["losses"], want, strict=True):
            mine = expected[result["rank"] * len(got) : (result["rank"] + 1) * len(got)]
            differences.append(largest_error(got, mine))
    return max(differences)


BIT_IDENTICAL: dict[str, tuple[int, bool, str, dict[str, Any]]] = {
    "zero1-2": (2, True, "zero", {"stage": 1}),
    "zero1-2-no-overlap": (2, True, "zero", {"stage": 1, "overlap_communication": False}),
    "zero2-2": (2, True, "zero", {"stage": 2}),
    "zero2-1": (1, False, "zero", {"stage": 2}),
    "zero2-4-same-batch": (4, False, "zero", {"stage": 2}),
    "zero1-2-overlap-allgather": (2, True, "zero", {"stage": 1, "overlap_allgather": True}),
    "zero2-2-small-buckets": (2, True, "zero", {"stage": 2, "reduce_bucket_size_in_m": 0}),
    "zero2-2-offload": (2, True, "zero", {"stage": 2, "cpu_offload": True}),
    "zero2-extra-dp-4-same-batch": (4, False, "zero", {"stage": 2, "extra_dp_size": 2}),
    "hybrid-zero0-2": (2, True, "hybrid", {"tp_size": 1, "pp_size": 1, "zero_stage": 0}),
    "hybrid-zero1-2": (2, True, "hybrid", {"tp_size": 1, "pp_size": 1, "zero_stage": 1}),
    "hybrid-zero2-2": (2, True, "hybrid", {"tp_size": 1, "pp_size": 1, "zero_stage": 2}),
    "ddp-2": (2, True, "ddp", {}),
}


@pytest.mark.parametrize("case", BIT_IDENTICAL)
def test_block_losses_are_bit_identical(case: str) -> None:
    num_ranks, different, plugin, options = BIT_IDENTICAL[case]
    if plugin != "ddp":
        options = {**options, "precision": "bf16"}
    results = run_ranks(num_ranks, block_cases.losses, plugin, options, STEPS, different)
    assert worst(results, plain(num_ranks, different)) == 0


# Tensor parallelism and unequal summation orders change the rounding of float32 sums.  A loss is a mean of log-sum-exps
# of magnitude 6: each of the 12 steps moves it by the rounding of the gradients, relative 2^-24 per operation and a few
# hundred operations deep, times the total movement of the loss (below 0.1), plus the rounding of the loss itself.
SUM_BOUND = 6 * 8 * 2**-24 + 0.1 * STEPS * 300 * 2**-24

WITHIN_ROUNDING: dict[str, tuple[int, bool, dict[str, Any], str]] = {
    "tp2": (2, False, {"tp_size": 2, "zero_stage": 0}, "llama"),
    "tp2-zero0": (4, True, {"tp_size": 2, "zero_stage": 0}, "llama"),
    "tp2-zero1": (4, True, {"tp_size": 2, "zero_stage": 1}, "llama"),
    "tp2-zero2": (4, True, {"tp_size": 2, "zero_stage": 2}, "llama"),
    "tp2-zero2-fused": (4, True, {"tp_size": 2, "zero_stage": 2}, "gpt2"),
    "tp4": (4, False, {"tp_size": 4, "zero_stage": 0}, "llama"),
    "zero2-3": (3, True, {"tp_size": 1, "zero_stage": 2}, "llama"),
}


@pytest.mark.parametrize("case", WITHIN_ROUNDING)
def test_block_losses_with_sgd_within_rounding(case: str) -> None:
    num_ranks, different, options, kind = WITHIN_ROUNDING[case]
    options = {**options, "pp_size": 1, "precision": "fp32"}
    results = run_ranks(num_ranks, partial(block_cases.losses, kind=kind), "hybrid", options, STEPS, different, "sgd")
    data_ranks = max(result["rank"] for result in results) + 1
    assert worst(results, plain(data_ranks, different, "sgd", torch.float32, kind=kind)) <= SUM_BOUND


@pytest.mark.parametrize(("stage", "no_sync"), [(1, True), (1, False), (2, False)])
def test_block_accumulation_equals_loop(stage: int, no_sync: bool) -> None:
    """Without no_sync each micro-batch is averaged on its own, which rounds differently: compared in float32."""
    precision, bound = ("bf16", 0.0) if no_sync else ("fp32", SUM_BOUND)
    options = {"stage": stage, "precision": precision}
    base = "adamw" if no_sync else "sgd"
    case = partial(block_cases.losses, accumulate=2, no_sync=no_sync)
    results = run_ranks(2, case, "zero", options, STEPS, True, base)
    dtype = torch.bfloat16 if no_sync else torch.float32
    assert worst(results, plain(2, True, base, dtype, accumulate=2)) <= bound


def test_block_clipping_uses_the_norm_of_what_is_active() -> None:
    options = {"tp_size": 2, "pp_size": 1, "zero_stage": 2, "precision": "fp32", "max_norm": 0.05}
    results = run_ranks(4, block_cases.losses, "hybrid", options, STEPS, True, "sgd")
    want = plain(2, True, "sgd", torch.float32, max_norm=0.05)
    unclipped = plain(2, True, "sgd", torch.float32)
    assert abs(want[-1][0] - unclipped[-1][0]) > 100 * SUM_BOUND, "the bound would not notice a missing clip"
    assert worst(results, want) <= SUM_BOUND


@pytest.mark.parametrize(("plugin", "options"), [("zero", {"stage": 2}), ("hybrid", {"tp_size": 1, "pp_size": 1})])
def test_block_gradient_checkpointing_equals_loop(plugin: str, options: dict[str, Any]) -> None:
    """The reentrant kind, which transformers uses by default, cuts the graph above frozen layers."""
    options = {**options, "precision": "bf16"}
    results = run_ranks(2, partial(block_cases.losses, checkpointing=True), plugin, options, STEPS, True)
    assert worst(results, plain(2, True)) == 0


def test_block_tied_embedding_trains_in_one_block() -> None:
    case = partial(block_cases.losses, tied=True, block={"include_embedding": True})
    results = run_ranks(2, case, "zero", {"stage": 2, "precision": "bf16"}, STEPS, True)
    blocks = ["model.embed_tokens.", *(f"model.layers.{i}." for i in range(LAYERS))]
    assert worst(results, plain(2, True, tied=True, blocks=blocks, order=[0, 1, 2, 3])) == 0


def test_block_random_order_is_the_same_on_every_rank() -> None:
    case = partial(block_cases.losses, block={"switch_mode": "random", "seed": 5})
    options = {"tp_size": 2, "pp_size": 1, "zero_stage": 2, "precision": "bf16"}
    results = run_ranks(4, case, "hybrid", options, STEPS, True)
    orders = [result["active"] for result in results]
    assert all(order == orders[0] for order in orders)
    assert len({str(active) for active in orders[0][: PERIOD * LAYERS]}) == LAYERS


def test_block_lamb_equals_lamb_of_one_process() -> None:
    """Layouts follow the active block: the trust ratio is of the whole weight after every switch."""
    options = {"tp_size": 2, "pp_size": 1, "zero_stage": 2, "precision": "fp32"}
    results = run_ranks(4, block_cases.losses, "hybrid", options, STEPS, False, "lamb")
    # Moments turn the rounding of near-zero gradients into steps, which few values have.
    assert worst(results, plain(2, False, "lamb", torch.float32)) <= 20 * SUM_BOUND
