"""Which entries of a tensor train in one epoch of the parameter-ratio form, and where a rank holds them.

A mask is a function of the seed, the parameter's name and the epoch on the *global* tensor, so that every sharding
trains the same entries.  n: values of data on this rank; k: those of them that train.
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
"""Places that are looked at together: masks of large tensors take no memory in proportion to them."""
FEISTEL_ROUNDS = 4
"""Of the network that permutes places; four make a pseudorandom permutation (Luby and Rackoff, 1988)."""


@dataclass(frozen=True)
class Selection:
    """Some entries of a flattened tensor of `numel` values: `count` in a row from `offset`, around the end.

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
        """Half-open ranges of places, ascending; of adjacent entries."""
        stop = self.offset + self.count
        around = [(0, stop - self.numel)] if stop > self.numel else []
        return [*around, (self.offset, min(stop, self.numel))]

    def holds(self, places: Tensor) -> Tensor:
        """[m] whether each of the places [m] in the global tensor is selected; `places` is overwritten."""
        return self.numbers(places) < self.count

    def numbers(self, places: Tensor) -> Tensor:
        """[m] number in the selection of each of the places [m]; from `count` on those that are not selected.

        `places` is overwritten.
        """
        if self.count == self.numel:
            return places
        if self.mode == "scatter":
            places = self._permuted(places)
        return places.sub_(self.offset).remainder_(self.numel)

    def _permuted(self, places: Tensor) -> Tensor:
        """[m] each place's number in the permutation: a Feistel network, applied until it stays below `numel`."""
        result = self._network(places)
        while bool((outside := result >= self.numel).any()):
            result[outside] = self._network(result[outside])
        return result

    def _network(self, places: Tensor) -> Tensor:
        half = max(1, -(-(self.numel - 1).bit_length() // 2))
        left, right = places >> half, places & (2**half - 1)
        for number in range(FEISTEL_ROUNDS):
            digest = hashlib.blake2b(f"{self.stream} {number}".encode(), digest_size=8).digest()
            key = int.from_bytes(digest, "big", signed=True)
            left, right = right, left ^ (random_bits(right.clone(), key) & (2**half - 1))
        return (left << half) | right


class Selected:
    """The selected entries that this rank holds, in the order of its memory.

    Args:
        layout: of the parameter.
        selection: of the global tensor.
        device: where the tensors are.
    """

    def __init__(self, layout: Layout, selection: Selection, device: torch.device) -> None:
        self._ranges: list[tuple[int, int]] | None = None
        self._index = torch.empty(0)
        start, stop = layout.span
        whole = selection.count == selection.numel
        if whole or (selection.mode == "adjacent" and (layout.split is None or layout.split.size == 1)):
            wanted = [(start, stop)] if whole else selection.ranges
            cut = [(max(first, start) - start, min(last, stop) - start) for first, last in wanted]
            self._ranges = [(first, last) for first, last in cut if first < last]
            return
        found = []
        for first in range(0, layout.num_local, CHUNK):
            last = min(first + CHUNK, layout.num_local)
            here = selection.holds(layout.positions(first, last, device))
            found.append((here.nonzero().view(-1) + first).to(_smallest(layout.num_local)))
        self._index = torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        """Number k of entries."""
        if self._ranges is None:
            return len(self._index)
        return sum(last - first for first, last in self._ranges)

    def take(self, flat: Tensor) -> Tensor:
        """[k] copies, in float32 or wider, of the entries of a flat local tensor."""
        dtype = wide(flat.dtype)
        if self._ranges is None:
            return flat.index_select(0, self._index.to(flat.device)).to(dtype)
        parts = [flat[first:last] for first, last in self._ranges]
        return torch.cat(parts).to(dtype) if parts else flat.new_empty(0, dtype=dtype)

    def put(self, flat: Tensor, values: Tensor) -> None:
        """Write [k] values into the entries of a flat local tensor."""
        values = values.to(flat.dtype)
        if self._ranges is None:
            flat.index_copy_(0, self._index.to(flat.device, torch.int64), values)
            return
        sizes = [last - first for first, last in self._ranges]
        for (first, last), part in zip(self._ranges, values.split(sizes), strict=True):
            flat[first:last] = part

    def count_below(self, place: int) -> int:
        """Number of entries before a place in the flat local tensor."""
        if self._ranges is None:
            return int((self._index < place).sum())
        return sum(min(last, place) - first for first, last in self._ranges if first < place)


def _smallest(size: int) -> torch.dtype:
    return torch.int32 if size < 2**31 else torch.int64


@dataclass(frozen=True, eq=False)
class SelectedGradient:
    """The selected entries of a gradient as what an engine reduces of it (see `LowRankGradient`)."""

    layout: Layout
    """Of the parameter on this rank."""
    selection: Selection
    device: torch.device

    divided = True
    """Each data-parallel rank needs the entries of its slice only."""

    @property
    def numel(self) -> int:
        """Entries of the shard, all its slices together."""
        return len(self.shard)

    @property
    def part_numel(self) -> int:
        """Entries of the slice that has most."""
        return max(last - first for first, last in self._bounds)

    def of(self, grad: Tensor) -> Tensor:
        """Entries of the gradient of this rank's shard, flat."""
        return self.shard.take(grad.reshape(-1))

    def rows(self, flat: Tensor) -> Tensor:
        """[W, part_numel] the entries of each slice, padded with zeros."""
        buffer = flat.new_zeros(len(self._bounds), self.part_numel)
        for row, (first, last) in zip(buffer, self._bounds, strict=True):
            row[: last - first] = flat[first:last]
        return buffer

    def held(self, flat: Tensor, *, partitioned: bool) -> Tensor:
        """The entries of this rank's slice, from its row of `rows` if `partitioned`, else from those of the shard."""
        first, last = self._bounds[0 if self.layout.slice is None else self.layout.slice.rank]
        return flat[: last - first] if partitioned else flat[first:last]

    def complete(self, held: Tensor) -> Sum:
        """Nothing is missing: entries are nobody else's."""
        return Sum(held, ())

    def square_sum(self, held: Tensor) -> Sum:
        """Request the squared norm of all selected entries."""
        return sum_of_squares(held, self.layout.axes)

    @cached_property
    def shard(self) -> Selected:
        """The selected entries of this rank's shard."""
        return Selected(dataclasses.replace(self.layout, slice=None), self.selection, self.device)

    @cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        """Entries of each slice: half-open ranges of the shard's."""
        piece = self.layout.slice
        if piece is None:
            return [(0, len(self.shard))]
        ends = [self.shard.count_below(rank * piece.length) for rank in range(piece.size + 1)]
        return list(itertools.pairwise(ends))


@dataclass(frozen=True, kw_only=True)
class SelectedSpec(StateSpec):
    """State of the selected entries.  In a file it has one value for each of them, by number in the selection."""

    selection: Selection

    def region(self, layout: Layout) -> Region:
        start, stop = layout.span
        return SelectedRegion(
            layout=dataclasses.replace(layout, slice=None),
            start=start,
            stop=stop,
            selection=self.selection,
            num_entries=self.shape[0],
        )


@dataclass(frozen=True, kw_only=True)
class SelectedRegion(Region):
    """The selected entries among a range of the flattened data of one shard.

    Ranks hold them in the order of memory, files by their numbers in the selection, which follow from the places of the
    entries alone: other ranks' entries need not be known.
    """

    selection: Selection
    num_entries: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.selection.count,)

    @property
    def numel(self) -> int:
        return self.num_entries

    @property
    def buffer_shape(self) -> tuple[int, ...]:
        return self.shape

    def fill(self, whole: Tensor, values: Tensor) -> None:
        for part, numbers in self._numbers(whole):
            whole[numbers] = values[part].to(whole.device, whole.dtype)

    def pick(self, whole: Tensor) -> Tensor:
        values = whole.new_empty(self.numel)
        for part, numbers in self._numbers(whole):
            values[part] = whole[numbers]
        return values

    def _numbers(self, whole: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Runs of the entries, and their numbers."""
        if tuple(whole.shape) != self.shape:
            raise ValueError(f"part of {self.shape} selected entries: got a whole tensor of {tuple(whole.shape)}")
        reached = 0
        for first in range(self.start, self.stop, CHUNK):
            last = min(first + CHUNK, self.stop)
            numbers = self.selection.numbers(self.layout.positions(first, last, whole.device))
            numbers = numbers[numbers < self.selection.count]
            yield slice(reached, reached + len(numbers)), numbers
            reached += len(numbers)
