"""Layouts are exact: the parts of all ranks make up the global tensor, and nothing else is data."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_bcd.sharding import FlatSlice, Layout, ShardView, TensorSplit, slice_length


@dataclass(frozen=True)
class Division:
    """How a tensor is divided over a whole mesh."""

    shape: tuple[int, ...]
    tp: int = 1
    zero: int | None = None
    dim: int | None = None
    sections: tuple[int, ...] | None = None
    padded: int | None = None
    slack: int = 0
    """Values by which every slice is longer than it has to be."""
    whole_rows: bool = False

    def layout(self, tp_rank, zero_rank):
        split = None
        if self.dim is not None:
            split = TensorSplit(
                axis="tp", dim=self.dim, rank=tp_rank, size=self.tp, sections=self.sections, padded=self.padded
            )
        layout = Layout(shape=self.shape, split=split)
        if self.zero is None:
            return layout
        length = layout.sliced("zero", zero_rank, self.zero, whole_rows=self.whole_rows).slice.length + self.slack
        piece = FlatSlice(axis="zero", rank=zero_rank, size=self.zero, length=length)
        return Layout(shape=self.shape, split=split, slice=piece)

    def layouts(self):
        """[tp rank][zero rank]."""
        return [[self.layout(t, z) for z in range(self.zero or 1)] for t in range(self.tp)]


@st.composite
def divisions(draw):
    shape = draw(st.lists(st.integers(1, 6), max_size=4))
    tp = draw(st.integers(1, 3))
    zero = draw(st.none() | st.integers(1, 5))
    slack = draw(st.integers(0, 3))
    kind = draw(st.sampled_from(["whole", "plain", "fused", "padded"])) if shape else "whole"
    dim = sections = padded = None
    if kind in ("plain", "fused"):
        dim = draw(st.integers(0, len(shape) - 1))
        parts = [tp * part for part in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))]
        shape[dim] = sum(parts)
        sections = tuple(parts) if kind == "fused" else None
    if kind == "padded":
        dim, padded = 0, tp * draw(st.integers(-(-shape[0] // tp), 8))
    return Division(tuple(shape), tp, zero, dim, sections, padded, slack, draw(st.booleans()))


def full_tensor(shape):
    """Distinct values, none of them zero."""
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)


def reassemble(division, parts):
    """Textbook inverse of sharding; `parts` is [tp rank][zero rank]."""
    rows = division.padded
    shards = []
    for row in parts:
        shard_shape = list(division.shape)
        if division.dim is not None:
            shard_shape[division.dim] = (rows or shard_shape[division.dim]) // division.tp
        flat = torch.cat([part.reshape(-1) for part in row])[: math.prod(shard_shape)]
        shards.append(flat.reshape(shard_shape))
    if division.dim is None:
        return shards[0]
    if rows is not None:
        return torch.cat(shards)[: division.shape[0]]
    sections = division.sections or (division.shape[division.dim],)
    fused = [shard.split([length // division.tp for length in sections], division.dim) for shard in shards]
    return torch.cat([part for section in zip(*fused, strict=True) for part in section], division.dim)


@given(divisions())
@settings(max_examples=300, deadline=None)
def test_layout_shards_reassemble_the_global_tensor(division):
    full = full_tensor(division.shape)
    parts = [[layout.shard(full) for layout in row] for row in division.layouts()]
    assert torch.equal(reassemble(division, parts), full)
    for row, part_row in zip(division.layouts(), parts, strict=True):
        for layout, part in zip(row, part_row, strict=True):
            assert tuple(part.shape) == layout.local_shape
            assert part.is_contiguous()
            assert part.dtype == full.dtype


@given(divisions())
@settings(max_examples=300, deadline=None)
def test_layout_counts_every_value_once_per_replica(division):
    replicas = 1 if division.dim is not None else division.tp
    layouts = [layout for row in division.layouts() for layout in row]
    assert sum(layout.num_local for layout in layouts) == math.prod(division.shape) * replicas
    assert {layout.numel for layout in layouts} == {math.prod(division.shape)}
    assert {layout.max_local for layout in layouts} == {math.prod(layouts[0].local_shape)}


@given(divisions())
@settings(max_examples=300, deadline=None)
def test_layout_padding_is_a_suffix_of_zeros(division):
    full = full_tensor(division.shape)
    for row in division.layouts():
        for layout in row:
            flat = layout.shard(full).reshape(-1)
            assert bool((flat[: layout.num_local] != 0).all())
            assert bool((flat[layout.num_local :] == 0).all())


@given(divisions())
@settings(max_examples=100, deadline=None)
def test_layout_shard_is_a_copy(division):
    full = full_tensor(division.shape)
    division.layout(0, 0).shard(full).fill_(-1)
    assert torch.equal(full, full_tensor(division.shape))


@given(divisions())
@settings(max_examples=200, deadline=None)
def test_view_partial_square_sums_add_up(division):
    """Summed over the axes that the request names, the partial sums are the norm of the global tensor."""
    full = full_tensor(division.shape)
    total = 0.0
    for row in division.layouts():
        for layout in row:
            part = layout.shard(full)
            part.view(-1)[layout.num_local :] = 7.0
            view = ShardView(layout, part, part)
            request = view.square_sum(view.param)
            replicas = 1 if "tp" in request.axes else division.tp
            total += request.value.item() / replicas
    assert total == pytest.approx(full.square().sum().item(), rel=1e-14)


def test_layout_axes_name_what_divides():
    split = TensorSplit(axis="tp", dim=0, rank=0, size=2)
    assert Layout(shape=(4, 3)).axes == ()
    assert Layout(shape=(4, 3), split=split).axes == ("tp",)
    assert Layout(shape=(4, 3), split=split).sliced("zero", 1, 4).axes == ("zero", "tp")
    assert Layout(shape=(4, 3)).sliced("zero", 0, 1).axes == ()
    assert Layout(shape=(4, 3), split=TensorSplit(axis="tp", dim=1, rank=0, size=1)).axes == ()


def test_layout_of_ragged_and_empty_slices():
    layouts = [Layout.whole((7,)).sliced("zero", rank, 5) for rank in range(5)]
    assert [layout.span for layout in layouts] == [(0, 2), (2, 4), (4, 6), (6, 7), (7, 7)]
    assert [layout.num_local for layout in layouts] == [2, 2, 2, 1, 0]
    assert [layout.local_shape for layout in layouts] == [(2,)] * 5


@given(st.lists(st.integers(1, 600), min_size=1, max_size=3), st.integers(1, 9))
@settings(max_examples=500, deadline=None)
def test_slices_of_whole_rows_pad_less_than_a_hundredth(shape, size):
    """The largest row that pads so little is the unit; where none does, slices are as long as they must be."""
    numel = math.prod(shape)
    even, aligned = slice_length(shape, size), slice_length(shape, size, whole_rows=True)
    assert even * size - numel < size
    assert slice_length(shape, size, whole_rows=True) * size >= numel
    rows = [math.prod(shape[dim:]) for dim in range(1, len(shape))]
    fitting = [row for row in rows if 100 * (-(-numel // (row * size)) * row * size - numel) < numel]
    if fitting:
        assert aligned == -(-numel // (fitting[0] * size)) * fitting[0]
        assert 100 * (aligned * size - numel) < numel
    else:
        assert aligned == even


@pytest.mark.parametrize(("shape", "size", "length"), [
    ((4096, 11008), 7, 586 * 11008),
    ((4096, 11008), 8, 512 * 11008),
    ((10, 7), 3, 24),
    ((199, 5), 2, 500),
    ((101, 5), 2, 255),
    ((100, 5), 3, 167),
    ((6, 50, 3), 4, 225),
    ((7,), 2, 4),
    ((), 2, 1),
    ((0, 5), 2, 0),
])  # fmt: skip
def test_slices_of_whole_rows_by_example(shape, size, length):
    assert slice_length(shape, size, whole_rows=True) == length
    assert Layout.whole(shape).sliced("zero", 0, size, whole_rows=True).local_shape == (length,)


def test_layout_of_a_vocabulary_ends_the_data_where_the_padding_begins():
    def layout(rank):
        return Layout(shape=(10, 3), split=TensorSplit(axis="tp", dim=0, rank=rank, size=4, padded=16))

    assert [layout(rank).num_local for rank in range(4)] == [12, 12, 6, 0]
    assert layout(2).sliced("zero", 0, 2).num_local == 6
    assert layout(2).sliced("zero", 1, 2).num_local == 0


def test_layout_of_fused_sections_gives_each_rank_its_part_of_each():
    split = TensorSplit(axis="tp", dim=0, rank=1, size=2, sections=(4, 2, 2))
    assert Layout(shape=(8,), split=split).shard(torch.arange(8)).tolist() == [2, 3, 5, 7]


def test_layout_is_a_value():
    split = TensorSplit(axis="tp", dim=0, rank=0, size=2)
    one, other = (Layout(shape=(4, 3), split=split).sliced("zero", 0, 2) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    with pytest.raises(AttributeError):
        one.shape = (1,)


@pytest.mark.parametrize("build", [
    lambda: TensorSplit(axis="tp", dim=0, rank=2, size=2),
    lambda: TensorSplit(axis="tp", dim=0, rank=-1, size=2),
], ids=["past", "negative"])  # fmt: skip
def test_split_refuses_a_rank_outside_its_size(build):
    with pytest.raises(ValueError, match=r"'tp'.*expected 0 <= rank < size 2"):
        build()


@pytest.mark.parametrize("options", [{"dim": 1}, {"dim": 0, "sections": (2, 2)}], ids=["dim 1", "sections"])
def test_split_refuses_padding_of_anything_but_an_unfused_dim_0(options):
    with pytest.raises(ValueError, match="only an unfused dim 0 can be padded"):
        TensorSplit(axis="tp", rank=0, size=2, padded=8, **options)


@pytest.mark.parametrize("options", [
    {"rank": 2, "size": 2, "length": 4},
    {"rank": -1, "size": 2, "length": 4},
    {"rank": 0, "size": 2, "length": -4},
], ids=["past", "negative", "length"])  # fmt: skip
def test_slice_refuses_a_rank_or_length_out_of_range(options):
    with pytest.raises(ValueError, match=r"'zero'.*expected 0 <= rank < size and a non-negative length"):
        FlatSlice(axis="zero", **options)


@pytest.mark.parametrize("dim", [2, -1])
def test_layout_refuses_a_dim_that_the_tensor_lacks(dim):
    with pytest.raises(ValueError, match=f"got split dim {dim}"):
        Layout(shape=(4, 4), split=TensorSplit(axis="tp", dim=dim, rank=0, size=2))


def test_layout_refuses_a_split_of_a_scalar():
    with pytest.raises(ValueError, match="got split dim 0"):
        Layout(shape=(), split=TensorSplit(axis="tp", dim=0, rank=0, size=1))


def test_layout_refuses_sections_that_do_not_add_up():
    with pytest.raises(ValueError, match=r"sections \(2, 4\) do not add up to 8"):
        Layout(shape=(8,), split=TensorSplit(axis="tp", dim=0, rank=0, size=2, sections=(2, 4)))


def test_layout_refuses_padding_below_the_length():
    with pytest.raises(ValueError, match="padded length 6 is below 8"):
        Layout(shape=(8,), split=TensorSplit(axis="tp", dim=0, rank=0, size=2, padded=6))


@pytest.mark.parametrize("options", [{}, {"sections": (3, 5)}, {"padded": 9}], ids=["plain", "section", "padded"])
def test_layout_refuses_what_does_not_divide(options):
    shape = (7,) if not options else (8,)
    with pytest.raises(ValueError, match="not divisible by the 2 ranks of axis 'tp'"):
        Layout(shape=shape, split=TensorSplit(axis="tp", dim=0, rank=0, size=2, **options))


def test_layout_refuses_slices_that_do_not_cover_the_shard():
    with pytest.raises(ValueError, match="2 slices of 3 do not cover a shard of 7 values"):
        Layout(shape=(7,), slice=FlatSlice(axis="zero", rank=0, size=2, length=3))


def test_layout_refuses_to_shard_another_shape():
    with pytest.raises(ValueError, match=r"got a tensor of \(3, 4\)"):
        Layout(shape=(4, 3)).shard(torch.zeros(3, 4))


@pytest.mark.parametrize("num_values", [0, 1, 4095, 4096, 10_000])
def test_view_square_sum_is_exact_for_every_length(num_values):
    x = torch.arange(num_values, dtype=torch.float64) % 7
    view = ShardView(Layout.whole((num_values,)), x, x)
    assert view.square_sum(view.param).value.item() == x.square().sum().item()


def test_view_square_sum_of_many_float32_values_keeps_its_digits():
    """One dot product over a large weight summed millions of squares one after the other in float32: it was 2.5e-4 off
    at 1e7 values and 3e-3 at 6e7, so a sharded LAMB took another step than a whole one."""
    x = torch.randn(10_000_000, generator=torch.Generator().manual_seed(0))
    exact = x.double().square().sum().item()
    view = ShardView(Layout.whole((len(x),)), x, x)
    # Roundings of 2^-24 that fall at random add up as a root: 64 in a row of 4096 values.
    assert view.square_sum(view.param).value.item() == pytest.approx(exact, rel=64 * 2**-24)


def test_view_computes_low_precision_in_float32_and_copies_nothing_else():
    param = torch.ones(4, dtype=torch.bfloat16)
    view = ShardView(Layout.whole((4,)), param, param)
    assert view.grad.dtype == torch.float32
    assert view.square_sum(param).value.dtype == torch.float64  # squares need twice the exponents
    single = torch.ones(4)
    assert ShardView(Layout.whole((4,)), single, single).grad.data_ptr() == single.data_ptr()
