"""Blocks on torch's sharded weights against a loop on one process that imports nothing of the package."""

from __future__ import annotations

import dataclasses
from typing import Any

import fsdp_block_cases as cases
import pytest
import torch
from fsdp_block_cases import LAYERS, Case

from colossal_bcd.testing import run_ranks

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
ENDS = ("model.embed_tokens.", *Case().prefixes, "lm_head.")
TWO_PASSES = {"turns": 2 * LAYERS}

EQUAL = {
    "two passes": Case(**TWO_PASSES),
    "two passes bf16": Case(dtype=BF16, **TWO_PASSES),
    "ascending": Case(mode="ascending"),
    "descending": Case(mode="descending", dtype=BF16),
    "fixed": Case(mode="fixed", turns=2),
    "embedding and head": Case(prefixes=ENDS, turns=len(ENDS), dtype=BF16),
    "embedding and head by user": Case(prefixes=ENDS, turns=len(ENDS), by_user=True),
    "tied": Case(tied=True, prefixes=ENDS[:-1], turns=LAYERS + 1),
    "user": Case(by_user=True, dtype=BF16),
    "early": Case(early=True),
    "evaluation": Case(evaluate=True, dtype=BF16),
    "evaluation by user": Case(evaluate=True, by_user=True, prefixes=ENDS, turns=len(ENDS)),
    "weights stay": Case(shard={"reshard_after_forward": False}, dtype=BF16),
    "checkpointing": Case(checkpoint=False, dtype=BF16),
    "reentrant checkpointing": Case(checkpoint=True),
    "offload": Case(shard={"offload_policy": cases.OFFLOAD}, dtype=BF16),
    "one reduction of two micro-batches": Case(accumulate=2, sync=False),
    "bread": Case(rule="sgd", mode="ascending", dtype=BF16),
    "bread momentum": Case(rule="momentum", base="our adamw"),
}
SGD: Any = {"dtype": F64, "base": "sgd"}
CLOSE = {
    "plain": Case(**SGD, **TWO_PASSES),
    "clip": Case(**SGD, max_norm=0.5),
    "one reduction of two micro-batches": Case(**SGD, accumulate=2, sync=False, max_norm=0.5),
    "two reductions": Case(**SGD, accumulate=2),
    "galore": Case(dtype=F64, base="galore"),
    **{base: Case(dtype=F64, base=base, turns=1, max_norm=0.5) for base in ("lamb", "came", "adafactor")},
    "checkpointing": Case(**SGD, checkpoint=False, accumulate=2, sync=False),
    "ends": Case(**SGD, prefixes=ENDS, turns=len(ENDS), by_user=True, evaluate=True),
    "tied and offloaded": Case(
        **SGD,
        tied=True,
        prefixes=ENDS[:-1],
        turns=LAYERS + 1,
        shard={"offload_policy": cases.OFFLOAD},
        evaluate=True,
        max_norm=0.5,
    ),
    **{f"bread {rule}": Case(**SGD, rule=rule, max_norm=0.5) for rule in ("sgd", "momentum", "descent", "galore")},
    "bread, two micro-batches at once": Case(**SGD, rule="momentum", accumulate=2, sync=False, checkpoint=False),
    "bread of tied ends": Case(**SGD, rule="momentum", tied=True, by_user=True, evaluate=True),
}
"""The sign of a gradient is another one after rounding, so that "sign" and "lion" are compared where it is equal."""
SIGNS = {f"bread {rule}": Case(rule=rule, turns=3) for rule in ("sign", "lion")}


@pytest.fixture(scope="module")
def equal() -> dict[str, Any]:
    every = EQUAL | SIGNS
    return dict(zip(every, run_ranks(2, cases.errors, *every.values())[0], strict=True))


@pytest.mark.parametrize("name", EQUAL | SIGNS)
def test_blocks_on_two_ranks_are_bit_equal_to_one_process(equal: dict[str, Any], name: str) -> None:
    assert equal[name]["equal"], equal[name]


@pytest.fixture(scope="module")
def close() -> dict[str, Any]:
    return dict(zip(CLOSE, run_ranks(3, cases.errors, *CLOSE.values())[0], strict=True))


@pytest.mark.parametrize("name", CLOSE)
def test_blocks_on_three_ranks_are_one_process_in_float64(close: dict[str, Any], name: str) -> None:
    """Hidden sizes do not divide by three, so that rows are uneven."""
    assert close[name]["losses"] <= 1e-12
    assert close[name]["weights"] <= 1e-12


ON_FOUR = {
    f"{mesh} {name}": dataclasses.replace(CLOSE[name], mesh=mesh)
    for mesh in ("fsdp", "hsdp", "tp2")
    for name in ("plain", "one reduction of two micro-batches", "bread momentum", "bread galore")
}


@pytest.mark.parametrize("name", ["bread momentum", "bread galore"])
def test_blocks_on_copies_shards_and_tensor_parallel_ranks_are_one_process_in_float64(name: str) -> None:
    found = run_ranks(8, cases.errors, dataclasses.replace(CLOSE[name], mesh="hsdp_tp2"), timeout=600)[0][0]
    assert found["losses"] <= 1e-12
    assert found["weights"] <= 1e-12


@pytest.fixture(scope="module")
def on_four() -> dict[str, Any]:
    return dict(zip(ON_FOUR, run_ranks(4, cases.errors, *ON_FOUR.values())[0], strict=True))


@pytest.mark.parametrize("name", ON_FOUR)
def test_blocks_on_four_ranks_are_one_process_in_float64(on_four: dict[str, Any], name: str) -> None:
    assert on_four[name]["losses"] <= 1e-12
    assert on_four[name]["weights"] <= 1e-12
