"""Block coordinate descent under pipeline parallelism against the same tuple of blocks on one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import block_cases
import models
import plain_badam
import pytest
import torch
from block_cases import PERIOD
from support.errors import largest_error
from test_block_plugins import SUM_BOUND

from colossal_bcd.testing import run_ranks

STEPS = 4 * PERIOD
OPTIONS: dict[str, Any] = {
    "tp_size": 1,
    "pp_size": 2,
    "zero_stage": 1,
    "precision": "fp32",
    "num_microbatches": 2,
    "max_norm": 1.0,
}


def plain(num_ranks: int, order: list[Any], num_layers: int, *, tied: bool = False) -> list[list[float]]:
    embedding = ["model.embed_tokens."] if tied else []
    return plain_badam.train(
        models.llama(layers=num_layers, tied=tied),
        embedding + [f"model.layers.{i}." for i in range(num_layers)],
        order,
        PERIOD,
        lambda step: [block_cases.batch_of(step, rank, different=True) for rank in range(num_ranks)],
        lambda masters: block_cases.base_optimizer("sgd", masters),
        models.loss,
        max_norm=1.0,
    )


def worst(results: list[dict[str, Any]], want: list[list[float]]) -> float:
    ends = [result for result in results if result["last"]]
    return max(
        largest_error(
            [end["losses"][step] for step in range(STEPS)], [want[step][end["rank"]] for step in range(STEPS)]
        )
        for end in ends
    )


@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [(2, {}), (2, {"zero_stage": 0}), (4, {"zero_stage": 0}), (4, {}), (4, {"tp_size": 2})],
    ids=["pp2-zero1", "pp2-zero0", "pp2-zero0-dp2", "pp2-zero1-dp2", "pp2-tp2"],
)
def test_pipeline_every_stage_trains_a_block_of_its_own(num_ranks: int, options: dict[str, Any]) -> None:
    results = run_ranks(num_ranks, block_cases.pipeline_losses, {**OPTIONS, **options}, STEPS, 4)
    data_ranks = max(result["rank"] for result in results) + 1
    assert worst(results, plain(data_ranks, [(0, 2), (1, 3)] * 2, 4)) <= SUM_BOUND
    assert all(len(held) == 9 for result in results for held in result["held"]), "memory is not balanced over stages"
    norms = [result["norm"] for result in results]
    assert max(norms) - min(norms) < 1e-6, "stages clip by different norms"


@pytest.mark.parametrize(("num_ranks", "options"), [(2, {}), (4, {"tp_size": 2})], ids=["pp2", "pp2-tp2"])
def test_pipeline_one_block_leaves_a_stage_without_work(num_ranks: int, options: dict[str, Any]) -> None:
    """The stage without an active block neither hangs in the norm's collectives nor breaks backward."""
    case = partial(block_cases.pipeline_losses, block={"block_ranges": [(0, 4)]})
    results = run_ranks(num_ranks, case, {**OPTIONS, **options}, STEPS, 4)
    data_ranks = max(result["rank"] for result in results) + 1
    assert worst(results, plain(data_ranks, [0, 1, 2, 3], 4)) <= SUM_BOUND
    for result in results:
        held = [len(names) for names in result["held"][::PERIOD]]
        assert held == ([0, 0, 9, 9] if result["last"] else [9, 9, 0, 0])
    norms = [result["norm"] for result in results]
    assert max(norms) - min(norms) < 1e-6, "stages clip by different norms"


def test_pipeline_weights_tied_across_stages_are_active_together() -> None:
    case = partial(block_cases.pipeline_losses, block={"include_embedding": True}, tied=True)
    results = run_ranks(2, case, OPTIONS, STEPS, 2)
    assert worst(results, plain(1, [(0, 2), (1, 2), (0, 2), (1, 2)], 2, tied=True)) <= SUM_BOUND
    held = [["model.embed_tokens.weight" in names for names in result["held"][::PERIOD]] for result in results]
    assert held == [[True, False, True, False]] * 2


def test_pipeline_blocks_across_stages_fall_back_to_one_block() -> None:
    """Blocks that reach over stages are active in the whole pipeline at once."""
    prefixes = [[f"model.layers.{i}.{part}." for i in range(4)] for part in ("self_attn", "mlp")]
    case = partial(block_cases.pipeline_losses, block={"block_prefix_list": prefixes})
    results = run_ranks(2, case, OPTIONS, STEPS, 4)
    want = plain_badam.train(
        models.llama(layers=4),
        [f"model.layers.{i}.{part}." for part in ("self_attn", "mlp") for i in range(4)],
        [(0, 1, 2, 3), (4, 5, 6, 7)] * 2,
        PERIOD,
        lambda step: [block_cases.batch_of(step, 0, different=True)],
        lambda masters: torch.optim.SGD(masters, lr=0.05, momentum=0.9),
        models.loss,
        max_norm=1.0,
    )
    assert worst(results, want) <= SUM_BOUND
