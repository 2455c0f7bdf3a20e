"""Images and norms: losses within rounding of those of whole gradients, clipping, refreshes that are spread out."""

from __future__ import annotations

from typing import Any

import low_rank_cases
import pytest
import torch
from low_rank_cases import GAP, MAX_NORM
from test_low_rank import STEPS, pattern

from colossal_bcd.testing import run_ranks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_low_rank_losses_equal_those_of_whole_gradients_within_rounding(precision: str) -> None:
    """Under SGD, which amplifies nothing, by a bound that follows from the roundings.

    float32: image and mean of images round each value by less than e = 64 * 2^-24 of the gradient's norm G (sums of up
    to 96 products, the mean, the projection back), so weights move apart by lr * scale * e * G a step, and by twice
    that with what curvature makes of it; the loss by G times that, and by its own rounding, 16 * 2^-24 of itself.
    bf16: the wire rounds images and whole gradients by 2^-9 of themselves each, so e = 2^-8; forward in bf16 rounds the
    loss by 2^-8 of itself.
    """
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    wire, own = (64 * 2**-24, 16 * 2**-24) if precision == "fp32" else (2**-8, 2**-8)
    args = ("zero", {"stage": 2, "precision": precision}, {"inner": "sgd", "svd_method": "random"}, STEPS, dtype)
    for report in run_ranks(2, low_rank_cases.compare, args, {}):
        assert report["images"] == pattern(14)
        norm = report["norm"]
        assert report["losses"] <= norm * 2 * STEPS * 1e-2 * 0.25 * wire * norm + own * report["loss"]


def test_low_rank_clipping_by_images_is_the_same_on_every_mesh() -> None:
    """What a step is given has the largest norm allowed; the norm before is that of one process."""
    alone = run_ranks(1, low_rank_cases.clipped, "zero", {"stage": 2, "precision": "fp32"})[0]
    assert alone["images"] == [0, 14, 14]
    assert min(alone["norms"]) > 10 * MAX_NORM
    assert alone["given"] == pytest.approx([MAX_NORM] * 3, rel=1e-4)
    assert alone["norms"][1] < 0.9 * alone["norms"][0], "images have smaller norms than whole gradients"
    cases: list[tuple[int, str, dict[str, Any]]] = [
        (3, "zero", {"stage": 2, "precision": "fp32"}),
        (2, "zero", {"stage": 1, "precision": "fp32"}),
        (2, "hybrid", {"tp_size": 2, "pp_size": 1, "zero_stage": 0, "precision": "fp32"}),
    ]
    for num_ranks, plugin, options in cases:
        for report in run_ranks(num_ranks, low_rank_cases.clipped, plugin, options):
            assert report["images"] == [0, 14, 14]
            assert report["norms"] == pytest.approx(alone["norms"], rel=1e-4)


def test_low_rank_clipping_by_whole_gradients_reduces_them() -> None:
    options = {"stage": 2, "precision": "fp32", "max_norm": 1.0}
    for report in run_ranks(2, low_rank_cases.trained, "zero", options, {}, GAP):
        assert report["images"] == [0] * GAP


def test_low_rank_follows_staggered_refreshes() -> None:
    """Which gradients stay whole differs by step and parameter; the numbers do not."""
    args = ("zero", {"stage": 2, "precision": "fp32"}, {"svd_method": "random", "stagger": GAP}, STEPS)
    for report in run_ranks(2, low_rank_cases.compare, args, {}):
        assert report["images"][0] == 0
        assert len(set(report["images"])) > 1
        assert min(report["images"][1:]) > 0, "no later step refreshes all"
        assert report["losses"] <= 1e-12
        assert report["weights"] <= 1e-12


def test_low_rank_pipelines_add_up_images_of_micro_batches() -> None:
    """Each stage adds up images of its micro-batches and reduces them once; the bounds are those of losses above."""
    options = {
        "tp_size": 1,
        "pp_size": 2,
        "zero_stage": 1,
        "precision": "fp32",
        "num_microbatches": 2,
        "max_norm": 0,
    }
    for report in run_ranks(4, low_rank_cases.pipelined, options, STEPS):
        assert report["images"] == [pattern(7), [0] * STEPS]
        weights = 2 * STEPS * 1e-2 * 0.25 * 64 * 2**-24 * report["norm"]
        assert report["weights"] <= weights + STEPS * 2**-24
        assert report["losses"] <= report["norm"] * weights + 16 * 2**-24 * report["loss"]
