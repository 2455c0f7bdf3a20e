"""Images instead of gradients under the real plugins: the same training, less traffic, less memory."""

from __future__ import annotations

import math
from typing import Any

import low_rank_cases
import pytest
import torch
from low_rank_cases import GAP, RANK

from colossal_bcd.testing import run_ranks

STEPS = 2 * GAP + 1
SMALL_BUCKETS = {"reduce_bucket_size_in_m": 0.002}
FLOAT64: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {"stage": 2}),
    "zero1-2": (2, {"stage": 1}),
    "zero1-2, no overlap": (2, {"stage": 1, "overlap_communication": False}),
    "zero2-3": (3, {"stage": 2, **SMALL_BUCKETS}),
    "zero2-2x2": (4, {"stage": 2, "extra_dp_size": 2}),
}


def pattern(num_matrices: int, steps: int = STEPS) -> list[int]:
    """Images by step: none at refreshes."""
    return [0 if step % GAP == 0 else num_matrices for step in range(steps)]


@pytest.mark.parametrize("case", FLOAT64)
def test_low_rank_training_is_exact_in_float64(case: str) -> None:
    """The mean of the images is the image of the mean: backward, hooks, buckets and steps through two refreshes."""
    num_ranks, options = FLOAT64[case]
    for projection in ("std", "reverse_std", "full") if case == "zero2-3" else ("std",):
        hyper = {"proj_type": projection, "svd_method": "random"}
        args = ("zero", {**options, "precision": "fp32"}, hyper, STEPS)
        for report in run_ranks(num_ranks, low_rank_cases.compare, args, {}):
            assert report["images"] == pattern(7)
            assert report["without"] == [0] * STEPS
            assert report["moved"] > 1e-2
            assert report["losses"] <= 1e-12
            assert report["weights"] <= 1e-12
            assert report["replicas"]


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_low_rank_training_is_exact_under_tensor_parallelism(zero_stage: int) -> None:
    """Shards along a projected dim have partial images, which are added up over tp.

    ColossalAI takes ZeRO with low precision only; there images travel in float32, and the masters differ by float32
    rounding, for which test_galore_plugins.py derives the bound.
    """
    options: dict[str, Any] = {"tp_size": 2, "pp_size": 1, "zero_stage": zero_stage, "precision": "fp32"}
    bound = 1e-12
    if zero_stage:
        options |= {"precision": "bf16", "communication_dtype": torch.float32}
        bound = STEPS * 2**-24 * (4 + 64 * 0.02 * 96**0.5)
    for report in run_ranks(4, low_rank_cases.injected, options, {"svd_method": "random"}, STEPS):
        assert report["images"] == pattern(14)
        assert report["without"] == [0] * STEPS
        assert report["error"] <= bound
        assert report["replicas"]


@pytest.mark.parametrize(("stage", "no_sync"), [(1, False), (1, True), (2, False)])
def test_low_rank_accumulation_is_exact(stage: int, no_sync: bool) -> None:
    """Three backward passes to a step are added up as images; at a refresh as whole gradients."""
    args = ("zero", {"stage": stage, "precision": "fp32"}, {"svd_method": "random"}, STEPS)
    for report in run_ranks(2, low_rank_cases.compare, args, {"accumulate": 3, "no_sync": no_sync}):
        assert report["images"] == pattern(7)
        assert report["losses"] <= 1e-12
        assert report["weights"] <= 1e-12


@pytest.mark.parametrize("plugin", ["zero", "ddp"])
def test_low_rank_inside_blocks_is_exact(plugin: str) -> None:
    """A new block begins with a refresh."""
    options = {"stage": 2, "precision": "fp32"} if plugin == "zero" else {}
    args = (plugin, options, {"svd_method": "random"}, 2 * STEPS)
    for report in run_ranks(2, low_rank_cases.compare, args, {"block": GAP + 2}):
        assert report["images"][: GAP + 3] == [0, 1, 1, 1, 0, 1, 0]
        assert report["losses"] <= 1e-12
        assert report["weights"] <= 1e-12


def test_low_rank_overflow_between_refreshes_skips_the_step_on_all_ranks() -> None:
    for stage in (1, 2):
        first, second = run_ranks(2, low_rank_cases.overflow, stage)
        assert first == second
        assert first["unchanged"]
        assert first["finite"]
        assert first["replicas"]
        assert first["scale"] == 2.0**7
        assert first["steps"] == [1, 2, 2, 3, 4, 5], "a skipped step must not count"
        assert first["images"] == [0, 14, 14, 14, 14, 0], "the refresh moves with the steps"


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
def test_low_rank_gradients_end_with_their_hook(stage: int, overlap: bool) -> None:
    """A whole gradient that lives until the next one comes is what image reduction is there to avoid."""
    for counts in run_ranks(2, low_rank_cases.survivors, stage, {}, overlap):
        assert counts[1:] == [0] * (GAP - 1)
        assert counts[0] > 0, "at a refresh gradients are kept"
    for counts in run_ranks(2, low_rank_cases.survivors, stage, {"reduce": False}, overlap):
        assert min(counts) > 0


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("stage", [1, 2])
def test_low_rank_bytes_of_reduction(stage: int, num_ranks: int) -> None:
    """Between refreshes at most rank / min(m, n) of the bytes of whole gradients, and 5 %: flags and boundary rows."""
    kind = "reduce_scatter_tensor" if stage == 2 else "all_reduce"
    options = {"stage": stage, "precision": "bf16"}
    for report in run_ranks(num_ranks, low_rank_cases.payloads, options, {}, {}):
        whole = [2 * math.prod(shape) for shape in report["shapes"]]
        images = [size * RANK / min(shape) for size, shape in zip(whole, report["shapes"], strict=True)]
        for step, count in enumerate(report["counts"]):
            assert list(count["reduced"]) == [kind]
            if step % GAP == 0:
                assert sum(whole) <= count["reduced"][kind] <= 1.05 * sum(whole)
            else:
                assert sum(images) <= count["reduced"][kind] <= 1.05 * sum(images)


def test_low_rank_right_projection_needs_no_collective_between_refreshes() -> None:
    """Slices begin with a row, so that every row is projected where it is, with images and with whole gradients."""
    for low_rank in ({}, {"reduce": False}):
        for report in run_ranks(
            2, low_rank_cases.payloads, {"stage": 2, "precision": "bf16"}, {"proj_type": "right"}, low_rank
        ):
            assert [count["inner"] == {} for count in report["counts"]] == [False, True, True, True, False]


def test_low_rank_states_are_sharded() -> None:
    (alone,) = run_ranks(1, low_rank_cases.payloads, {"stage": 2, "precision": "bf16"}, {}, {})
    matrices = alone["shapes"]
    bases = sum(4 * RANK * min(shape) for shape in matrices)
    moments = sum(2 * 4 * RANK * max(shape) for shape in matrices)
    assert alone["state"] == bases + moments
    for report in run_ranks(2, low_rank_cases.payloads, {"stage": 2, "precision": "bf16"}, {}, {}):
        assert report["state"] == bases + moments // 2


@pytest.mark.parametrize(("plugin", "options"), [
    ("zero", {"stage": 2, "precision": "bf16"}),
    ("hybrid", {"tp_size": 2, "pp_size": 1, "zero_stage": 2, "precision": "bf16", "max_norm": 0}),
    ("hybrid", {"tp_size": 2, "pp_size": 1, "zero_stage": 1, "precision": "bf16", "max_norm": 0}),
], ids=["zero2-4", "tp2-zero2", "tp2-zero1"])  # fmt: skip
def test_low_rank_replicas_stay_equal(plugin: str, options: dict[str, Any]) -> None:
    args = (plugin, options, {}, 20, torch.bfloat16)
    for report in run_ranks(4, low_rank_cases.trained, *args):
        assert report["images"] == pattern(14, 20)
        assert report["replicas"]
        assert all(math.isfinite(loss) for loss in report["losses"])
