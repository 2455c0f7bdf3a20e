"""Chunks of values that share a scale, and tensors that are stacked, as parts of whole ones in files."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from colossal_bcd.sharding import Layout, TensorSplit, slice_length
from colossal_bcd.sharding.regions import StackedRegion, chunks, covers, elements

SIZE = 4


def layouts(shape: tuple[int, ...], split: dict | None, zero: int) -> Iterator[Layout]:
    for tp_rank in range(split["size"] if split else 1):
        layout = Layout(shape=shape, split=TensorSplit(axis="tp", rank=tp_rank, **split) if split else None)
        for rank in range(zero):
            yield layout.sliced("zero", rank, zero, chunk=SIZE) if zero > 1 else layout


CASES = [
    ((7, 5), None, True),
    ((1,), None, True),
    ((6, 8), {"dim": 0, "size": 2}, True),
    ((3, 16), {"dim": 1, "size": 2}, True),
    ((2, 6, 8), {"dim": 1, "size": 3}, True),
    ((24, 3), {"dim": 0, "size": 2, "sections": (8, 16)}, True),
    ((5, 24), {"dim": 1, "size": 2, "sections": (8, 16)}, True),
    ((13, 2), {"dim": 0, "size": 2, "padded": 16}, True),
    ((3, 12), {"dim": 1, "size": 2}, False),
    ((6, 3), {"dim": 0, "size": 2}, False),
    ((12, 1), {"dim": 0, "size": 2, "sections": (4, 8)}, False),
]


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize(("shape", "split", "aligned"), CASES, ids=str)
def test_chunks_of_a_part_are_those_of_the_whole_or_none(shape, split, aligned, zero):
    full = torch.arange(math.prod(shape), dtype=torch.float64).add(1).view(shape)
    flat = torch.nn.functional.pad(full.reshape(-1), (0, -full.numel() % SIZE)).view(-1, SIZE)
    want = flat.amax(-1)
    cuts = [chunks(layout, SIZE) for layout in layouts(shape, split, zero)]
    if not aligned:
        assert None in cuts
        return
    assert covers(cuts)
    whole = torch.zeros(cuts[0].buffer_shape, dtype=torch.float64)
    for layout, cut in zip(layouts(shape, split, zero), cuts, strict=True):
        held = layout.shard(full).reshape(-1)
        held = torch.nn.functional.pad(held, (0, -held.numel() % SIZE)).view(-1, SIZE).amax(-1)
        cut.fill(whole, cut.values(held))
        assert torch.equal(cut.pick(want.view(cut.shape)), held[: cut.numel])
    assert torch.equal(whole.view(-1), want)


@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("lead", [(2,), (2, 3)])
@pytest.mark.parametrize(("shape", "split"), [(case[0], case[1]) for case in CASES], ids=str)
def test_stacked_tensors_are_put_together_and_taken_apart(shape, split, lead, zero):
    full = torch.randn(*lead, *shape)
    cuts, parts = [], []
    for layout in layouts(shape, split, zero):
        cuts.append(StackedRegion.of(elements(layout), lead))
        each = [layout.shard(tensor) for tensor in full.view(-1, *shape)]
        parts.append(torch.stack(each).view(*lead, *layout.local_shape))
    assert covers(cuts)
    whole = torch.zeros(cuts[0].buffer_shape)
    for cut, part in zip(cuts, parts, strict=True):
        cut.fill(whole, cut.values(part))
        again = torch.full_like(part, 7.0)
        cut.write(again, cut.pick(full))
        assert torch.equal(again, part)
    assert torch.equal(cuts[0].as_filed(whole), full)


def test_slices_begin_with_a_chunk():
    for shape, size, length in [((67, 131), 2, 4608), ((5,), 2, 256), ((64, 65), 3, 1536), ((7, 3), 1, 21)]:
        assert slice_length(shape, size, chunk=256) == length
        assert Layout.whole(shape).sliced("zero", 0, size, chunk=256).local_shape == (length,)
