"""Which part of which global tensor this rank holds: pure values, no process group.

Legend: shape is the global tensor without padding; shard_shape is this rank's tensor-parallel shard, padding included;
local_shape is what this rank stores (the shard, or a flat ZeRO slice of it, padding included); num_local counts the
stored values that are data.  Padding is always a suffix of the flattened local tensor, so "the data" is a prefix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MAX_PADDING = 100
"""Slices are made of whole rows where that pads less than one value in so many."""


def slice_length(shape: Sequence[int], size: int, *, whole_rows: bool = False, chunk: int = 1) -> int:
    """Values of each slice of a flattened shard; every part of the package that divides shards asks here.

    Args:
        shape: of the shard, padding included.
        size: number of slices.
        whole_rows: slices begin with a row of the first dim by the rest, or else of the last dim, where less than 1 %
            of padding does that; right projections and row statistics then need no other rank.
        chunk: slices begin at a multiple of so many values: those that share a scale where state is quantised.
    """
    numel = math.prod(shape)
    for dim in range(1, len(shape)) if whole_rows else ():
        row = math.prod(shape[dim:])
        length = -(-numel // (row * size)) * row if row else 0
        if (length * size - numel) * MAX_PADDING < numel:
            return length
    if size == 1:
        return numel
    return -(-numel // (size * chunk)) * chunk


@dataclass(frozen=True, kw_only=True)
class TensorSplit:
    """One axis divides one dim of a tensor.

    Fused weights (a query-key-value projection) are several sections along the dim, and every section is divided
    on its own: rank i holds the i-th part of each.
    """

    axis: str
    """Name of the mesh axis."""
    dim: int
    """Dim of the global tensor, non-negative."""
    rank: int
    size: int
    sections: tuple[int, ...] | None = None
    """Global lengths of the fused sections along `dim`; None is one section."""
    padded: int | None = None
    """Global length of dim 0 with padding (a vocabulary); None is no padding."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"split over {self.axis!r}: got rank {self.rank}, expected 0 <= rank < size {self.size}")
        if self.padded is not None and (self.dim != 0 or self.sections is not None):
            raise ValueError(
                f"split over {self.axis!r}: got padding on dim {self.dim} with sections {self.sections}; "
                "only an unfused dim 0 can be padded"
            )


@dataclass(frozen=True, kw_only=True)
class FlatSlice:
    """One axis divides the flattened shard into equal lengths; the last ones may be short or empty."""

    axis: str
    """Name of the mesh axis (it may stand for several process groups)."""
    rank: int
    size: int
    length: int
    """Values stored per rank, padding included."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size or self.length < 0:
            raise ValueError(
                f"slice over {self.axis!r}: got rank {self.rank} of {self.size}, length {self.length}; "
                "expected 0 <= rank < size and a non-negative length"
            )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """This rank's part of one parameter.

    Raises:
        ValueError: a dim is not divisible by its axis, or the slices do not cover the shard.
    """

    shape: tuple[int, ...]
    split: TensorSplit | None = None
    slice: FlatSlice | None = None

    def __post_init__(self) -> None:
        split, piece = self.split, self.slice
        if split is not None:
            if not 0 <= split.dim < len(self.shape):
                raise ValueError(f"layout of {self.shape}: got split dim {split.dim}, expected one of its dims")
            length = self.shape[split.dim]
            if split.sections is not None and sum(split.sections) != length:
                raise ValueError(f"layout of {self.shape}: sections {split.sections} do not add up to {length}")
            if split.padded is not None and split.padded < length:
                raise ValueError(f"layout of {self.shape}: padded length {split.padded} is below {length}")
            for part in self._sections:
                if part % split.size:
                    raise ValueError(
                        f"layout of {self.shape}: {part} along dim {split.dim} is not divisible by the "
                        f"{split.size} ranks of axis {split.axis!r}"
                    )
        if piece is not None and piece.length * piece.size < math.prod(self.shard_shape):
            raise ValueError(
                f"layout of {self.shape}: {piece.size} slices of {piece.length} do not cover a shard of "
                f"{math.prod(self.shard_shape)} values"
            )

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Layout:
        """The layout of a tensor that this rank holds entirely."""
        return cls(shape=tuple(shape))

    def sliced(self, axis: str, rank: int, size: int, *, whole_rows: bool = False, chunk: int = 1) -> Layout:
        """This layout with its shard flattened and divided over `axis` into slices of `slice_length`."""
        length = slice_length(self.shard_shape, size, whole_rows=whole_rows, chunk=chunk)
        return Layout(
            shape=self.shape, split=self.split, slice=FlatSlice(axis=axis, rank=rank, size=size, length=length)
        )

    def at(self, *, slice_rank: int | None = None, split_rank: int | None = None) -> Layout:
        """The layout of another rank.

        Args:
            slice_rank: its number on the slice's axis; None: this rank's.
            split_rank: its number on the split's axis; None: this rank's.
        """
        split, piece = self.split, self.slice
        if slice_rank is not None:
            assert piece is not None
            piece = dataclasses.replace(piece, rank=slice_rank)
        if split_rank is not None:
            assert split is not None
            split = dataclasses.replace(split, rank=split_rank)
        return dataclasses.replace(self, split=split, slice=piece)

    @property
    def unsliced(self) -> Layout:
        """The layout of the whole shard of which this rank has a slice."""
        return self if self.slice is None else dataclasses.replace(self, slice=None)

    @property
    def _sections(self) -> tuple[int, ...]:
        assert self.split is not None
        if self.split.sections is not None:
            return self.split.sections
        return (self.split.padded or self.shape[self.split.dim],)

    @cached_property
    def numel(self) -> int:
        """Values of the global tensor: what a mean divides by."""
        return math.prod(self.shape)

    @cached_property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of the tensor-parallel shard, padding included."""
        if self.split is None:
            return self.shape
        shape = list(self.shape)
        shape[self.split.dim] = sum(self._sections) // self.split.size
        return tuple(shape)

    @cached_property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that this rank stores, padding included."""
        return self.shard_shape if self.slice is None else (self.slice.length,)

    @cached_property
    def max_local(self) -> int:
        """Values stored by the rank that stores most: the same number on every rank, for decisions in common."""
        return math.prod(self.local_shape)

    @cached_property
    def span(self) -> tuple[int, int]:
        """Half-open range of the flattened shard that this rank holds as data."""
        stop = self.shard_data
        if self.slice is None:
            return 0, stop
        start = min(self.slice.rank * self.slice.length, stop)
        return start, min(start + self.slice.length, stop)

    @cached_property
    def num_local(self) -> int:
        """Values of data on this rank; 0 for an empty slice."""
        start, stop = self.span
        return stop - start

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Axes over which the parameter is divided: a sum over local values is partial along these."""
        split = (self.split.axis,) if self.split is not None and self.split.size > 1 else ()
        piece = (self.slice.axis,) if self.slice is not None and self.slice.size > 1 else ()
        return piece + split

    @cached_property
    def shard_data(self) -> int:
        """Length of the prefix of the flattened shard that is data."""
        shape = list(self.shard_shape)
        if self.split is not None and self.split.padded is not None:
            first = self.split.rank * shape[0]
            shape[0] = min(max(self.shape[0] - first, 0), shape[0])
        return math.prod(shape)

    def shard(self, full: Tensor) -> Tensor:
        """Cut this rank's part out of the global tensor; padding is zero.

        Args:
            full: the global tensor, of `shape`.
        Returns:
            A new contiguous tensor of `local_shape`.
        """
        if tuple(full.shape) != self.shape:
            raise ValueError(f"layout of {self.shape}: got a tensor of {tuple(full.shape)}")
        local = full
        if self.split is not None:
            split = self.split
            if split.padded is not None:
                local = torch.cat([full, full.new_zeros(split.padded - self.shape[0], *self.shape[1:])])
            parts = [
                part.chunk(split.size, split.dim)[split.rank] for part in local.split(list(self._sections), split.dim)
            ]
            local = torch.cat(parts, split.dim)
        if self.slice is not None:
            start, stop = self.span
            flat = full.new_zeros(self.slice.length)
            flat[: stop - start] = local.reshape(-1)[start:stop]
            return flat
        return local.clone(memory_format=torch.contiguous_format)

    def unshard(self, parts: Sequence[Tensor]) -> Tensor:
        """The global tensor, from the data of its tensor-parallel shards.

        Args:
            parts: flat data of each shard without padding, by rank of the split's axis; one part if there is no split.
        Returns:
            A tensor of `shape`.
        """
        if self.split is None:
            return parts[0].view(self.shape)
        split, rest = self.split, list(self.shard_shape)
        if split.padded is not None or split.dim == 0:
            rest[0] = -1
        shards = [part.view(rest) for part in parts]
        if split.sections is None:
            return torch.cat(shards, split.dim)
        lengths = [section // split.size for section in split.sections]
        sections = zip(*(shard.split(lengths, split.dim) for shard in shards), strict=True)
        return torch.cat([part for section in sections for part in section], split.dim)

    def indices(self, dim: int, device: torch.device | None = None) -> Tensor:
        """[local length along `dim`] global indices of what this rank's shard holds along a dim, padding excluded.

        Computed on the device, without a copy from the host.
        """
        whole = torch.arange(self.shape[dim], device=device)
        if self.split is None or self.split.dim != dim:
            return whole
        split = Layout(shape=(len(whole),), split=dataclasses.replace(self.split, dim=0))
        return split.shard(whole)[: split.shard_data]

    def positions(self, start: int, stop: int, device: torch.device | None = None) -> Tensor:
        """[stop - start] int64 places in the flattened global tensor of the values [start, stop) of this rank's data.

        Computed on the device, without a copy from the host.

        Args:
            start: first of the `num_local` values of data.
            stop: one past the last.
            device: where the result lies; None: torch's default.
        Raises:
            ValueError: the range is not within the data.
        """
        if not 0 <= start <= stop <= self.num_local:
            raise ValueError(f"layout of {self.shape}: got values [{start}, {stop}), expected some of {self.num_local}")
        first = self.span[0]
        at = torch.arange(first + start, first + stop, device=device)
        split = self.split
        if split is None or split.size == 1:
            return at
        length, inner = self.shard_shape[split.dim], math.prod(self.shard_shape[split.dim + 1 :])
        outer, column = at // (length * inner), at % inner
        index = at.div_(inner, rounding_mode="floor").remainder_(length)
        shift, begin = torch.zeros_like(index), 0
        for section in self._sections:
            # Before this rank's part lie the other ranks' parts of earlier sections, and those of lower ranks.
            part = section // split.size
            shift.masked_fill_(index >= begin, (split.size - 1) * begin + split.rank * part)
            begin += part
        return outer.mul_(self.shape[split.dim]).add_(index).add_(shift).mul_(inner).add_(column)

    def as_matrix(self) -> Layout:
        """The layout of the same values with all dims but the first flattened into one.

        Raises:
            ValueError: fewer than two dims.
        """
        if len(self.shape) == 2:
            return self
        if len(self.shape) < 2:
            raise ValueError(f"layout of {self.shape}: got {len(self.shape)} dims, expected two or more for a matrix")
        split = self.split
        if split is not None and split.dim > 0:
            # Every index of the dims between the first and the divided one begins a run that is divided on its own.
            outer, inner = math.prod(self.shape[1 : split.dim]), math.prod(self.shape[split.dim + 1 :])
            sections = tuple(section * inner for section in self._sections) * outer
            split = dataclasses.replace(split, dim=1, sections=sections)
        return Layout(shape=(self.shape[0], math.prod(self.shape[1:])), split=split, slice=self.slice)
