"""State leaves every mesh in the shapes, and with the values, that one process has, and comes back."""

import io

import canonical_cases as cases
import pytest
import torch
from canonical_cases import SHAPES
from conformance_cases import Sizes

from colossal_bcd.optim.state.quantized import dequantize, quantize_into, restore_into
from colossal_bcd.sharding import FlatSlice, Layout, LowRank
from colossal_bcd.sharding.regions import covers, elements, low_rank_region
from colossal_bcd.testing import run_ranks

TOLERANCE = 1e-12
MESHES = [Sizes(1, 1), Sizes(1, 3), Sizes(2, 1), Sizes(2, 2)]


@pytest.fixture(scope="module")
def expected():
    return {name: cases.alone(name) for name in cases.MAKE}


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_state_of_every_mesh_is_that_of_one_process(sizes, expected):
    file = io.BytesIO()
    torch.save(expected, file)  # hundreds of tensors, each of which would be handed over by a file of its own
    ranks = run_ranks(sizes.tp * sizes.zero, cases.sharded_each, sizes, file.getvalue())
    for optimizer, states in expected.items():
        for index, whole in enumerate(states):
            # Rows of a low-rank image need no mean: one of its vectors is whole everywhere.
            image = "left" in whole or "right" in whole
            found = [rank[optimizer][index] for rank in ranks]
            check(f"{optimizer} {SHAPES[index]}", whole, found, has_totals=not image)


def check(case, whole, ranks, has_totals):
    for name, want in whole.items():
        parts = [rank["sent"][name] for rank in ranks]
        first = parts[0][0]
        assert covers([entry.region for entry, _ in parts]), (case, name)
        buffer = torch.full(first.region.buffer_shape, torch.nan, dtype=torch.float64)
        for entry, values in parts:
            entry.region.fill(buffer, values)
        found = first.region.as_filed(buffer)
        assert found.shape == first.region.shape
        assert name[-4:] in ("_row", "_col") or found.shape == want.shape
        assert first.dtype == want.dtype
        assert torch.allclose(found.view(want.shape), want, rtol=0, atol=TOLERANCE), (case, name)
    names = set(ranks[0]["sent"]) | set(ranks[0]["absent"])
    totals = {name for name in names if name.endswith("_total")}
    assert names - totals == set(whole)
    assert totals == {name.replace("_row", "_total") for name in whole if name.endswith("_row") and has_totals}
    assert max(rank["error"] for rank in ranks) <= TOLERANCE, case


@pytest.mark.parametrize("length", [1, 7, 10, 23])
def test_every_row_of_a_low_rank_image_is_on_one_rank(length):
    """Rows at ends of slices were on two ranks, which summed their gradients in other orders, and files kept one."""
    numel = 5 * 10
    size = -(-numel // length)
    held, parts = [], torch.arange(5.0).view(5, 1)
    for rank in range(size):
        piece = FlatSlice(axis="zero", rank=rank, size=size, length=length)
        layout = Layout(shape=(5, 10), slice=piece)
        low_rank = LowRank(layout, "right", 1)
        held += range(low_rank.rows.start, low_rank.rows.stop)
        assert torch.equal(low_rank_region(layout, "right", 1).pick(parts), parts[low_rank.rows].view(-1))
    assert held == list(range(5))


def test_parts_with_a_gap_do_not_cover():
    layouts = [Layout.whole((5, 3)).sliced("zero", rank, 4) for rank in range(4)]
    cuts = [elements(layout) for layout in layouts]
    assert covers(cuts)
    assert not covers(cuts[:3])
    assert not covers(cuts[1:])
    assert not covers([cuts[0], *cuts[2:]])


@pytest.mark.parametrize("seed", range(8))
def test_8_bit_moments_come_back_bit_for_bit(seed):
    """Stored again as usual, a block whose largest value is negative shrinks by 0.7 %."""
    values = torch.randn(256 * 5 + 13, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 4)
    values[:256] = -values[:256].abs()
    values[256:512] = 0
    values[520] = 1e4
    codes, scales = torch.zeros(len(values), dtype=torch.uint8), torch.zeros(6)
    quantize_into(codes, scales, values)
    read = dequantize(codes, scales)
    again, scales_again = torch.zeros_like(codes), torch.zeros_like(scales)
    quantize_into(again, scales_again, read)
    assert not torch.equal(dequantize(again, scales_again), read)
    restore_into(again, scales_again, read)
    assert torch.equal(dequantize(again, scales_again), read)


def test_8_bit_moments_of_other_blocks_are_quantised():
    values = torch.randn(700, generator=torch.Generator().manual_seed(0))
    codes, scales = torch.zeros(700, dtype=torch.uint8), torch.zeros(3)
    quantize_into(codes, scales, values)
    moved = dequantize(codes, scales)[100:]
    other, other_scales = torch.zeros(600, dtype=torch.uint8), torch.zeros(3)
    restore_into(other, other_scales, moved)
    error = (dequantize(other, other_scales) - moved).abs().max()
    assert 0 < error <= 0.0072 * moved.abs().max()


def test_8_bit_moments_that_are_not_finite_stay_so():
    codes, scales = torch.zeros(10, dtype=torch.uint8), torch.zeros(1)
    restore_into(codes, scales, torch.tensor([1.0, torch.nan] * 5))
    assert not dequantize(codes, scales).isfinite().any()
