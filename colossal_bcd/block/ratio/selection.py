"""Which values of a tensor train in one period of the parameter-ratio form, and which of them a rank has.

They are a function of the seed, the parameter's name and the period on the *global* tensor, so that every sharding
trains the same ones.  n: values of data on this rank; k: those of them that train.

A matrix of 4 x 6 values of which 7 train at a time; the number says in which period, and after the last value the first
one follows, so that in period 3 the values marked . train together with the first four of period 0:

    "adjacent"       "scatter"
    0 0 0 0 0 0      1 1 . 0 0 0
    0 1 1 1 1 1      1 . 1 0 2 2
    1 1 2 2 2 2      2 1 2 0 1 1
    2 2 2 . . .      2 2 0 2 0 .

A rank of a ZeRO slice or of a tensor-parallel shard has the values that fall into its part: "adjacent" ones may all be
one rank's, and of columns they are a run in every row; "scatter" gives every rank about its share.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from colossal_bcd.optim.state.rounding import random_bits
from colossal_bcd.optim.state.spec import StateSpec
from colossal_bcd.sharding import Layout, Sum, sum_of_squares, wide
from colossal_bcd.sharding.regions import Region

MaskMode = Literal["adjacent", "scatter"]
CHUNK = 2**22
"""Positions that are looked at together: masks of large tensors take no memory in proportion to them."""
FEISTEL_ROUNDS = 4
"""Of the network that permutes positions; four make a pseudorandom permutation (Luby and Rackoff, 1988)."""


@dataclass(frozen=True)
class Selection:
    """Some values of a flattened tensor of `numel`: `count` in a row from `offset`, around the end.

    "adjacent" counts in the order of memory, "scatter" in that of a permutation that belongs to `stream`.
    """

    numel: int
    count: int
    offset: int = 0
    mode: MaskMode = "adjacent"
    stream: str = ""
    """Name of the permutation."""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Half-open ranges of positions, ascending; of adjacent values."""
        stop = self.offset + self.count
        around = [(0, stop - self.numel)] if stop > self.numel else []
        return [*around, (self.offset, min(stop, self.numel))]

    def holds(self, positions: Tensor) -> Tensor:
        """[m] whether each of the positions [m] in the global tensor is selected; `positions` is overwritten."""
        return self.numbers(positions) < self.count

    def numbers(self, positions: Tensor) -> Tensor:
        """[m] number in the selection of each of the positions [m]; from `count` on those that are not selected.

        `positions` is overwritten.
        """
        if self.count == self.numel:
            return positions
        if self.mode == "scatter":
            positions = self._permuted(positions)
        return positions.sub_(self.offset).remainder_(self.numel)

    def _permuted(self, positions: Tensor) -> Tensor:
        """[m] each position's number in the permutation: a Feistel network, applied until it stays below `numel`."""
        result = self._network(positions)
        # How often is a matter of the cycles of this very permutation, so that the host has to ask.
        while bool((outside := result >= self.numel).any()):
            result[outside] = self._network(result[outside])
        return result

    def _network(self, positions: Tensor) -> Tensor:
        half = max(1, -(-(self.numel - 1).bit_length() // 2))
        left, right = positions >> half, positions & (2**half - 1)
        for number in range(FEISTEL_ROUNDS):
            digest = hashlib.blake2b(f"{self.stream} {number}".encode(), digest_size=8).digest()
            key = int.from_bytes(digest, "big", signed=True)
            left, right = right, left ^ (random_bits(right.clone(), key) & (2**half - 1))
        return (left << half) | right


class Selected:
    """The selected values that this rank has, in the order of its memory, and what an engine reduces of a gradient.

    Slices of one shard over three ranks, the selected values in capitals.  Data-parallel ranks reduce those of the
    whole shard, and each needs its row, padded with zeros to the longest (see `LowRankGradient`):

        shard  |aABbbC|DdEFgg|Hhhh..|   of: ABCDEFH   rows: ABC
                rank 0 rank 1 rank 2                        DEF
                                                            H00

    Args:
        layout: of the parameter on this rank.
        selection: of the global tensor.
        device: where they are looked for, once one is asked for.
    """

    divided = True
    """Each data-parallel rank needs the values of its slice only."""

    def __init__(self, layout: Layout, selection: Selection, device: torch.device) -> None:
        self.layout, self.selection, self.device = layout, selection, device

    def __len__(self) -> int:
        """Number k of values."""
        return len(self._index) if self._ranges is None else sum(last - first for first, last in self._ranges)

    def take(self, flat: Tensor) -> Tensor:
        """[k] copies, in float32 or wider, of the selected ones of a flat local tensor."""
        dtype = wide(flat.dtype)
        if self._ranges is None:
            return flat.index_select(0, self._index.to(flat.device)).to(dtype)
        runs = [flat[first:last] for first, last in self._ranges]
        return torch.cat(runs).to(dtype) if runs else flat.new_empty(0, dtype=dtype)

    def put(self, flat: Tensor, values: Tensor) -> None:
        """Write [k] values into the selected ones of a flat local tensor."""
        values = values.to(flat.dtype)
        if self._ranges is None:
            flat.index_copy_(0, self._index.to(flat.device, torch.int64), values)
            return
        sizes = [last - first for first, last in self._ranges]
        for (first, last), run in zip(self._ranges, values.split(sizes), strict=True):
            flat[first:last] = run

    @property
    def numel(self) -> int:
        """Selected values of the shard, all its slices together."""
        return len(self.shard)

    @property
    def part_numel(self) -> int:
        """Those of the slice that has most."""
        return max(last - first for first, last in self._bounds)

    def of(self, grad: Tensor) -> Tensor:
        """Selected values of the gradient of this rank's shard, flat."""
        return self.shard.take(grad.reshape(-1))

    def rows(self, flat: Tensor) -> Tensor:
        """[W, part_numel] those of each slice, padded with zeros."""
        buffer = flat.new_zeros(len(self._bounds), self.part_numel)
        for row, (first, last) in zip(buffer, self._bounds, strict=True):
            row[: last - first] = flat[first:last]
        return buffer

    def of_slice(self, flat: Tensor, *, partitioned: bool) -> Tensor:
        """Those of this rank's slice, from its row of `rows` if `partitioned`, else from those of the shard."""
        first, last = self._bounds[0 if self.layout.slice is None else self.layout.slice.rank]
        return flat[: last - first] if partitioned else flat[first:last]

    def complete(self, values: Tensor) -> Sum:
        """Nothing is missing: no other rank has a part of these values."""
        return Sum(values, ())

    def square_sum(self, values: Tensor) -> Sum:
        """Request the squared norm of all selected values."""
        return sum_of_squares(values, self.layout.axes)

    @cached_property
    def shard(self) -> Selected:
        """The selected values of this rank's shard, all its slices together."""
        if self.layout.slice is None:
            return self
        return Selected(dataclasses.replace(self.layout, slice=None), self.selection, self.device)

    @cached_property
    def _ranges(self) -> list[tuple[int, int]] | None:
        """Half-open ranges of the flat local tensor; None: the values are scattered in it."""
        layout, selection = self.layout, self.selection
        start, stop = layout.span
        whole = selection.count == selection.numel
        if not whole and (selection.mode == "scatter" or (layout.split is not None and layout.split.size > 1)):
            return None
        wanted = [(start, stop)] if whole else selection.ranges
        here = [(max(first, start) - start, min(last, stop) - start) for first, last in wanted]
        return [(first, last) for first, last in here if first < last]

    @cached_property
    def _index(self) -> Tensor:
        """[k] positions in the flat local tensor."""
        size, found = self.layout.num_local, [torch.empty(0, dtype=torch.int32, device=self.device)]
        for first in range(0, size, CHUNK):
            positions = self.layout.positions(first, min(first + CHUNK, size), self.device)
            index = self.selection.holds(positions).nonzero().view(-1) + first
            found.append(index.to(torch.int32 if size < 2**31 else torch.int64))
        return torch.cat(found)

    @cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        """Selected values of each slice: half-open ranges of the shard's."""
        mine = self.layout.slice
        if mine is None:
            return [(0, len(self))]
        ends = [self.shard._count_below(rank * mine.length) for rank in range(mine.size + 1)]
        return list(itertools.pairwise(ends))

    def _count_below(self, position: int) -> int:
        if self._ranges is None:
            return int((self._index < position).sum())
        return sum(min(last, position) - first for first, last in self._ranges if first < position)


@dataclass(frozen=True, kw_only=True)
class SelectedSpec(StateSpec):
    """State of the selected values.  In a file it has one value for each of them, by number in the selection."""

    selection: Selection

    def region(self, layout: Layout) -> Region:
        start, stop = layout.span
        return SelectedRegion(
            layout=dataclasses.replace(layout, slice=None),
            start=start,
            stop=stop,
            selection=self.selection,
            num_selected=self.shape[0],
        )


@dataclass(frozen=True, kw_only=True)
class SelectedRegion(Region):
    """The selected values among a range of the flattened data of one shard.

    Ranks have them in the order of memory, files by their numbers in the selection, which follow from the positions of
    the values alone: other ranks' values need not be known.
    """

    selection: Selection
    num_selected: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.selection.count,)

    @property
    def numel(self) -> int:
        return self.num_selected

    @property
    def buffer_shape(self) -> tuple[int, ...]:
        return self.shape

    def fill(self, whole: Tensor, values: Tensor) -> None:
        for run, numbers in self._numbers(whole):
            whole[numbers] = values[run].to(whole.device, whole.dtype)

    def pick(self, whole: Tensor) -> Tensor:
        values = whole.new_empty(self.numel)
        for run, numbers in self._numbers(whole):
            values[run] = whole[numbers]
        return values

    def _numbers(self, whole: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Runs of the values, and their numbers."""
        if tuple(whole.shape) != self.shape:
            raise ValueError(f"part of {self.shape} selected values: got a whole tensor of {tuple(whole.shape)}")
        reached = 0
        for first in range(self.start, self.stop, CHUNK):
            last = min(first + CHUNK, self.stop)
            numbers = self.selection.numbers(self.layout.positions(first, last, whole.device))
            numbers = numbers[numbers < self.selection.count]
            yield slice(reached, reached + len(numbers)), numbers
            reached += len(numbers)
