"""Maps a rank's tensor to its region of the full tensor, so that files do not depend on the mesh: pure values.

R, C, r, c, k, m as in `sharding.matrix`; q: rank of a low-rank gradient; n: values of data in a rank's tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from colossal_bcd.sharding.layout import Layout, TensorSplit
from colossal_bcd.sharding.low_rank import Side, low_rank_of
from colossal_bcd.sharding.matrix import matrices_of

CHUNK = 2**22
"""Values that are placed at once: their int64 places do not grow with the tensor."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A range of the flattened data of one shard of a tensor.

    A rank's tensor holds the n = stop - start values of the range first; what follows is padding.
    """

    layout: Layout
    """Of the whole tensor, without a slice: its split is this rank's."""
    start: int
    stop: int
    transposed: bool = False
    """Files have, and ranks hold, the transpose of the matrix that `layout` describes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor in a file."""
        return self.layout.shape[::-1] if self.transposed else self.layout.shape

    @property
    def numel(self) -> int:
        """Number n of values."""
        return self.stop - self.start

    @property
    def buffer_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in which `fill` puts parts together."""
        return self.layout.shape

    @property
    def key(self) -> tuple[int, int, int, int]:
        """What tells regions of one whole tensor apart: rank and number of shards, start, stop."""
        split = self.layout.split
        return (0, 1, self.start, self.stop) if split is None else (split.rank, split.size, self.start, self.stop)

    def values(self, held: Tensor) -> Tensor:
        """[n] the data of a rank's tensor; a view if possible."""
        flat = held.T.reshape(-1) if self.transposed else held.reshape(-1)
        return flat[: self.numel]

    def write(self, held: Tensor, values: Tensor) -> None:
        """Write the data of a rank's tensor, in place; padding becomes zero.

        Args:
            held: the rank's tensor.
            values: [n] of any dtype, on any device.
        """
        if self.transposed:
            held.T.copy_(values.view(held.T.shape))
            return
        if len(values) < held.numel():
            held.zero_()
        if held.is_contiguous():
            held.view(-1)[: len(values)].copy_(values)
        else:
            held.copy_(values.view(held.shape))

    def fill(self, whole: Tensor, values: Tensor) -> None:
        """Write the values where they belong in the whole tensor, of `buffer_shape`, in place."""
        self._check(whole)
        flat = whole.view(-1)
        if self._is_range:
            flat[self.start : self.stop].copy_(values)
            return
        for first in range(self.start, self.stop, CHUNK):
            last = min(first + CHUNK, self.stop)
            part = values[first - self.start : last - self.start].to(flat.device, flat.dtype)
            flat[self.layout.positions(first, last, flat.device)] = part

    def pick(self, whole: Tensor) -> Tensor:
        """[n] the values of this part of a whole tensor, as a file has it."""
        whole = whole.T.contiguous() if self.transposed else whole.contiguous()
        self._check(whole)
        flat = whole.view(-1)
        if self._is_range:
            return flat[self.start : self.stop]
        values = flat.new_empty(self.numel)
        for first in range(self.start, self.stop, CHUNK):
            last = min(first + CHUNK, self.stop)
            values[first - self.start : last - self.start] = flat[self.layout.positions(first, last, flat.device)]
        return values

    def as_filed(self, whole: Tensor) -> Tensor:
        """A whole tensor of `buffer_shape` as files have it, contiguous."""
        return whole.T.contiguous() if self.transposed else whole

    @property
    def _is_range(self) -> bool:
        return self.layout.split is None or self.layout.split.size == 1

    def _check(self, whole: Tensor) -> None:
        if tuple(whole.shape) != self.layout.shape:
            raise ValueError(f"part of a tensor of {self.layout.shape}: got a whole one of {tuple(whole.shape)}")


@dataclass(frozen=True, kw_only=True)
class StackedRegion(Region):
    """The same range of each of several tensors that are one, along leading dims."""

    lead: tuple[int, ...]
    """Lengths of the leading dims."""

    @classmethod
    def of(cls, region: Region, lead: tuple[int, ...]) -> Region:
        """Several of `region`; the region itself where there are no leading dims."""
        return cls(layout=region.layout, start=region.start, stop=region.stop, lead=lead) if lead else region

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, *self.layout.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.lead) * self._one.numel

    @property
    def buffer_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def _one(self) -> Region:
        return Region(layout=self.layout, start=self.start, stop=self.stop)

    def values(self, held: Tensor) -> Tensor:
        return held.reshape(math.prod(self.lead), -1)[:, : self._one.numel].reshape(-1)

    def write(self, held: Tensor, values: Tensor) -> None:
        count = math.prod(self.lead)
        for each, part in zip(held.view(count, -1), values.view(count, -1), strict=True):
            self._one.write(each, part)

    def fill(self, whole: Tensor, values: Tensor) -> None:
        for each, part in self._pairs(whole, values):
            self._one.fill(each, part)

    def pick(self, whole: Tensor) -> Tensor:
        values = whole.new_empty(self.numel)
        for each, part in self._pairs(whole.contiguous(), values):
            part.copy_(self._one.pick(each))
        return values

    def _pairs(self, whole: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        count = math.prod(self.lead)
        return zip(whole.view(count, *self.layout.shape), values.view(count, self._one.numel), strict=True)


def covers(regions: Sequence[Region]) -> bool:
    """Whether parts of one tensor make up the whole."""
    first = regions[0].layout
    num_shards = first.split.size if first.split is not None else 1
    for shard in range(num_shards):
        mine = sorted((each.start, each.stop) for each in regions if each.key[0] == shard)
        layout = first if first.split is None else first.at(split_rank=shard)
        reached = 0
        for start, stop in mine:
            if start > reached:
                return False
            reached = max(reached, stop)
        if reached < layout.shard_data:
            return False
    return True


def whole(shape: tuple[int, ...]) -> Region:
    """All of a tensor that every rank holds."""
    return Region(layout=Layout.whole(shape), start=0, stop=math.prod(shape))


def elements(layout: Layout) -> Region:
    """One value for each value of the parameter's data."""
    start, stop = layout.span
    return Region(layout=layout.unsliced, start=start, stop=stop)


def chunks(layout: Layout, size: int) -> Region | None:
    """One value for each run of `size` values of a rank's tensor; whole: of the flattened tensor.

    The rank's last run may reach into padding.  None: the rank's runs are not those of the whole tensor.
    """
    start, stop = layout.span
    if start < stop and start % size:
        return None
    start, stop = -(-start // size), -(-stop // size)
    total, split = -(-layout.numel // size), layout.split
    if split is None or split.size == 1:
        return Region(layout=Layout.whole((total,)), start=start, stop=stop)
    inner, outer = math.prod(layout.shape[split.dim + 1 :]), math.prod(layout.shape[: split.dim])
    lengths = split.sections or (split.padded or layout.shape[split.dim],)
    if any(length // split.size * inner % size for length in lengths):
        return None
    runs = [length * inner // size for length in lengths]
    if outer == 1 and split.sections is None:
        padded = runs[0] if runs[0] != total else None
        return Region(
            layout=Layout(shape=(total,), split=dataclasses.replace(split, dim=0, padded=padded)),
            start=start,
            stop=stop,
        )
    sections = None if split.sections is None else tuple(runs)
    return Region(
        layout=Layout(shape=(outer, sum(runs)), split=dataclasses.replace(split, dim=1, sections=sections)),
        start=start,
        stop=stop,
    )


def rows(layout: Layout) -> Region:
    """[k] one value for each row that the rank touches; whole: the shape without its last dim."""
    segments = matrices_of(layout).rows
    return _runs(_without(layout, (len(layout.shape) - 1,)), segments.first, segments.count)


def columns(layout: Layout) -> Region:
    """[m, c] one value for each column of the matrices that the rank touches; whole: the shape without its rows."""
    matrices = matrices_of(layout)
    segments = matrices.matrices
    return _runs(_without(layout, (len(layout.shape) - 2,)), segments.first, segments.count, matrices.c)


def totals(layout: Layout) -> Region:
    """[m] one value for each matrix that the rank touches; whole: the shape without its last two dims."""
    segments = matrices_of(layout).matrices
    last = len(layout.shape) - 1
    return _runs(_without(layout, (last - 1, last)), segments.first, segments.count)


def low_rank_region(layout: Layout, side: Side, rank: int) -> Region:
    """The matrix's low-rank gradient, as `LowRank` divides it; whole: [R, q], [q, C] or [q, q]."""
    if side == "full":
        return whole((rank, rank))
    return _times(
        low_rank_rows(layout, side, rank) if side == "right" else low_rank_columns(layout, side, rank), rank, side
    )


def low_rank_rows(layout: Layout, side: Side, rank: int) -> Region:
    """One value for each row of a low-rank gradient."""
    if side != "right":
        return whole((rank,))
    mine = low_rank_of(layout, side, rank).rows
    return _runs(_without(layout, (1,)), mine.start, mine.stop - mine.start)


def low_rank_columns(layout: Layout, side: Side, rank: int) -> Region:
    """One value for each column of a low-rank gradient."""
    if side != "left":
        return whole((rank,))
    mine = low_rank_of(layout, side, rank).columns
    return Region(layout=_without(layout, (0,)), start=mine.start, stop=mine.stop)


def _times(region: Region, rank: int, side: Side) -> Region:
    """A region of vectors with `rank` values for each value of a region."""
    layout = dataclasses.replace(region.layout, shape=(*region.layout.shape, rank))
    return Region(layout=layout, start=region.start * rank, stop=region.stop * rank, transposed=side == "left")


def _without(layout: Layout, dims: tuple[int, ...]) -> Layout:
    """The layout of a tensor that has one value where the parameter has all those along `dims`."""
    shape = tuple(length for dim, length in enumerate(layout.shape) if dim not in dims)
    split: TensorSplit | None = layout.split
    if split is not None:
        kept = None if split.dim in dims else split.dim - sum(dim < split.dim for dim in dims)
        split = None if kept is None else dataclasses.replace(split, dim=kept)
    return Layout(shape=shape, split=split)


def _runs(layout: Layout, first: int, count: int, length: int = 1) -> Region:
    # A rank may count matrices that are padding only.
    start = min(first * length, layout.shard_data)
    return Region(layout=layout, start=start, stop=min((first + count) * length, layout.shard_data))
