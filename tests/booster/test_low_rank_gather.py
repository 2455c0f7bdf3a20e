"""Images of updates instead of weights: every replica applies the same low-rank update."""

from __future__ import annotations

import math

import low_rank_cases
import pytest
import torch
from low_rank_cases import GAP, RANK
from test_low_rank import SMALL_BUCKETS, STEPS

from colossal_bcd.testing import run_ranks


@pytest.mark.parametrize("projection", ["std", "full"])
def test_low_rank_gather_is_exact_in_float64(projection: str) -> None:
    """Every replica applies the gathered steps to whole weights."""
    hyper = {"proj_type": projection, "svd_method": "random", "weight_decay": 0.1}
    for stage, num_ranks in ((2, 3), (1, 2)):
        options = {"stage": stage, "precision": "fp32", **SMALL_BUCKETS}
        for report in run_ranks(num_ranks, low_rank_cases.gathered, options, hyper, STEPS, torch.float64):
            assert report["error"] <= 1e-12
            assert report["replicas"]


def test_low_rank_gather_inside_blocks_is_exact() -> None:
    options = {"stage": 2, "precision": "fp32"}
    for report in run_ranks(
        2, low_rank_cases.gathered, options, {"svd_method": "random"}, STEPS, torch.float64, GAP + 2
    ):
        assert report["error"] <= 1e-12
        assert report["replicas"]


def test_low_rank_gather_sends_images_and_keeps_replicas_equal() -> None:
    """At most rank / min(m, n) of the bytes of weights, and 5 %; 20 steps with stochastic rounding.

    Steps are rounded to bfloat16, by 2^-9 of themselves, and weights, below 1/4, by 2^-10 at most: now and then two
    runs with the same random bits round apart, and training carries that on.  On average they stay within a rounding.
    """
    options = {"stage": 2, "precision": "bf16"}
    for report in run_ranks(2, low_rank_cases.gathered, options, {"rounding": "stochastic"}, 20, torch.bfloat16):
        whole = [2 * math.prod(shape) for shape in report["shapes"]]
        images = sum(size * RANK / min(shape) for size, shape in zip(whole, report["shapes"], strict=True))
        assert report["bytes"][0] == sum(whole)
        assert images <= report["bytes"][1] <= 1.05 * images
        assert report["replicas"]
        assert report["mean"] <= 2**-10


def test_low_rank_options_that_would_be_ignored_are_refused() -> None:
    for masters, rounding, stage, ddp in run_ranks(1, low_rank_cases.refusals):
        assert "master_weights=True" in masters
        assert 'expected rounding="stochastic"' in rounding
        assert "0 ZeRO groups" in stage
        assert "torch's DDP reduces whole gradients" in ddp
