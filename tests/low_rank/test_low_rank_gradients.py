"""Images instead of gradients: the same numbers on any mesh."""

from __future__ import annotations

import low_rank_gradient_cases
import pytest
import torch
from conformance_cases import Sizes
from galore_cases import CASES, GAP, STEPS

from colossal_bcd import GaLoreAdamW
from colossal_bcd.sharding import Layout, LowRankGradient
from colossal_bcd.testing import run_ranks

MESHES = [Sizes(1, 1), Sizes(2, 1), Sizes(1, 3), Sizes(2, 2)]
PROJECTED = sum(len(case.shape) > 1 for case in CASES)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("partitioned", [True, False], ids=["partitioned", "whole"])
def test_low_rank_gradients_give_the_step_of_whole_gradients(sizes: Sizes, partitioned: bool) -> None:
    """The mean of the ranks' images is the image of their mean gradient; refreshes take whole gradients."""
    for reports in run_ranks(sizes.tp * sizes.zero, low_rank_gradient_cases.sharded_by_projection, sizes, partitioned):
        for projection, report in reports.items():
            assert report["error"] <= 1e-12, projection
            assert report["norm_error"] <= 1e-12, projection
            assert report["counts"] == [0 if step % GAP == 0 else PROJECTED for step in range(STEPS)], projection


def test_low_rank_gradients_of_bfloat16_gradients_are_computed_in_float32_by_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks add up 37 rows one after the other, in float32: an error of a root of them in units of 2^-24."""
    monkeypatch.setattr("colossal_bcd.sharding.low_rank.CAST_VALUES", 100)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(37, 20, generator=generator).bfloat16()
    left, _ = torch.linalg.qr(torch.randn(37, 4, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(20, 4, generator=generator))
    exact = grad.double()
    layout = Layout.whole((37, 20))
    for side, bases, want in (
        ("right", (None, right), exact @ right.double()),
        ("left", (left, None), left.double().T @ exact),
        ("full", (left, right), left.double().T @ exact @ right.double()),
    ):
        image = LowRankGradient(layout=layout, side=side, rank=4, left=bases[0], right=bases[1])
        found = image.of(grad)
        assert found.dtype == torch.float32
        assert (found.view(image.shape) - want).abs().max() <= 2 * 37**0.5 * 2**-24 * want.abs().max()


def test_low_rank_gradients_handed_over_at_a_refresh_are_refused() -> None:
    """The step would have taken bases from a gradient of zeros."""
    param = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = GaLoreAdamW([{"params": [param], "rank": 2, "update_proj_gap": 5}])
    param.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    (image,) = optimizer.low_rank_wanted().values()
    optimizer.param_groups[0]["update_proj_gap"] = 1
    assert optimizer.low_rank_wanted() == {}
    param.grad = param.new_zeros(()).expand_as(param)
    optimizer.give_low_rank({param: image.of(torch.ones(6, 4)).view(6, 2)})
    with pytest.raises(RuntimeError, match=r"parameter of shape \(6, 4\) was reduced as a low-rank one"):
        optimizer.step()
