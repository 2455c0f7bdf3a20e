"""Row and column statistics of a flat slice, completed over the ranks that share a row or a matrix.

A tensor of two or more dims is a batch of matrices over its last two dims.  R, C: rows and columns of one global
matrix; r, c: of one matrix in this rank's tensor-parallel shard; n: values of data on this rank; k, m: rows and
matrices that they touch, the first and the last of which other ranks may touch, too.  Everything may have a leading
dim, of parameters that share the layout.

A ZeRO slice is part of a row, whole rows, part of a row.  Three slices of a matrix with rows of four columns:

    rank 0 |aaaa aaaa aa|
    rank 1              |aa aaaa aaa|
    rank 2                          |a aaaa ....|     . = padding, never data

Rank 1 has a tail of row 2, all of row 3 and a head of row 4.  Rows 2 and 4 are *shared*: their sums are complete only
over two ranks, and every rank has a slot for each of them in one small all-reduce, which is zero where it has no part:

                 slot of row 2   slot of row 4
    rank 0            aa               0
    rank 1            aa              aaa
    rank 2             0               a

The sums of whole rows never travel.  Which rows are shared follows from the slices' lengths alone, so every rank sends
the same slots.  The same holds for matrices in place of rows: a run is either.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from colossal_bcd.sharding.layout import Layout
from colossal_bcd.sharding.lazy import WHOLE, Columns, Lazy, Rows, Run, divided, row_and_column_sums
from colossal_bcd.sharding.rounds import Combined, Sum


@dataclass(frozen=True)
class Segments:
    """Equal consecutive runs of the flattened shard, rows or matrices, as a ZeRO slice sees them."""

    first: int
    """First run that this rank touches."""
    count: int
    """Number of runs that it touches; 0 for an empty slice."""
    shared: tuple[int, ...]
    """Runs that lie on several ranks: the same tuple on all of them."""
    begun: int = 0
    """1 if the first run that it touches begins on an earlier rank, else 0."""

    @classmethod
    def of(cls, layout: Layout, length: int, end: int) -> Segments:
        """Runs of `length` values before `end`."""
        piece = layout.slice
        if piece is None:
            return cls(0, -(-end // length), ())
        start, stop = min(piece.rank * piece.length, end), min((piece.rank + 1) * piece.length, end)
        first, touches = start // length, stop > start
        bounds = [rank * piece.length for rank in range(1, piece.size)]
        shared = {bound // length for bound in bounds if bound < end and bound % length}
        count = -(-stop // length) - first if touches else 0
        return cls(first, count, tuple(sorted(shared)), int(touches and start % length > 0))

    def complete(self, partial: Tensor, over_runs: tuple[str, ...], within_runs: tuple[str, ...], dim: int) -> Combined:
        """Request the totals of the runs that this rank touches.

        Args:
            partial: sums over this rank's values; `count` along `dim`.
            over_runs: axes that divide every run.
            within_runs: axes over whose ranks a shared run is spread.
            dim: of the runs, counted from the last.
        Returns:
            Request that resolves to a tensor shaped like `partial`.
        """
        if not self.shared:
            return Combined((Sum(partial, over_runs),), lambda totals: totals)
        mine = [(slot, run - self.first) for slot, run in enumerate(self.shared) if 0 <= run - self.first < self.count]
        shape = list(partial.shape)
        shape[dim] = len(self.shared)
        slots = partial.new_zeros(shape)
        for slot, index in mine:
            slots.select(dim, slot).copy_(partial.select(dim, index))

        def finish(totals: Tensor, shared: Tensor) -> Tensor:
            if mine:
                totals = totals.clone()
            for slot, index in mine:
                totals.select(dim, index).copy_(shared.select(dim, slot))
            return totals

        return Combined((Sum(partial, over_runs), Sum(slots, within_runs + over_runs)), finish)

    def spread(self, begun_here: Tensor, within_runs: tuple[str, ...], dim: int) -> Combined:
        """Request values of all runs that this rank touches, each from the rank on which it begins.

        Args:
            begun_here: values of the runs that begin on this rank; `count - begun` along `dim`.
            within_runs: axes over whose ranks a shared run is spread.
            dim: of the runs, counted from the last.
        Returns:
            Request that resolves to a tensor with `count` along `dim`.
        """
        if not self.shared:
            return Combined((Sum(begun_here, ()),), lambda values: values)
        shape = list(begun_here.shape)
        shape[dim] = len(self.shared)
        slots = begun_here.new_zeros(shape)
        for slot, run in enumerate(self.shared):
            if self.begun <= run - self.first < self.count:
                slots.select(dim, slot).copy_(begun_here.select(dim, run - self.first - self.begun))

        def finish(begun_here: Tensor, shared: Tensor) -> Tensor:
            if not self.begun:
                return begun_here
            return torch.cat([shared.narrow(dim, self.shared.index(self.first), 1), begun_here], dim)

        return Combined((Sum(begun_here, ()), Sum(slots, within_runs)), finish)


@dataclass(frozen=True)
class Means:
    """Means over columns and over rows of every matrix that a rank touches."""

    row: Tensor
    """[k] means over the C columns."""
    col: Tensor
    """[m, c] means over the R rows."""
    total: Tensor | None
    """[m] means over R x C; only where neither rows nor columns are whole on the rank (see `Matrices.normaliser`)."""


class Matrices:
    """The batch of matrices in one layout, on one rank.

    A rank has the rows that its slice touches (k values) and the columns of the matrices that it touches (m x c), never
    vectors of other ranks' rows.

    Raises:
        ValueError: the tensor has fewer than two dims.
    """

    def __init__(self, layout: Layout) -> None:
        if len(layout.shape) < 2:
            raise ValueError(
                f"matrices of a layout of {layout.shape}: got {len(layout.shape)} dims, expected two or more"
            )
        self.layout = layout
        self.r, self.c = layout.shard_shape[-2:]
        self.rows = Segments.of(layout, self.c, layout.shard_data)
        # Padded rows count, so that all ranks of a padded vocabulary have the same matrices, also one that has no data.
        self.matrices = Segments.of(layout, self.r * self.c, math.prod(layout.shard_shape))
        split = layout.split if layout.split is not None and layout.split.size > 1 else None
        last = len(layout.shape) - 1
        self.row_axes = (split.axis,) if split is not None and split.dim == last else ()
        self.col_axes = (split.axis,) if split is not None and split.dim == last - 1 else ()
        self._runs: dict[int, list[Run]] = {}
        self.zero_axes = (layout.slice.axis,) if layout.slice is not None and layout.slice.size > 1 else ()

    @property
    def needs_total(self) -> bool:
        """Whether neither all rows nor all columns of a matrix are on this rank."""
        return bool(self.row_axes) and bool(self.zero_axes)

    def means(self, x: Tensor | Lazy) -> Combined:
        """Request the row and column means of the whole matrices.

        Args:
            x: [n] values on this rank.
        Returns:
            Request that resolves to `Means`.
        """
        num_rows, num_cols = self.layout.shape[-2:]
        row, col = row_and_column_sums(x, self.runs, (self.rows.count, self.matrices.count, self.c))
        parts = [
            self.rows.complete(row, self.row_axes, self.zero_axes, dim=-1),
            self.matrices.complete(col, self.col_axes, self.zero_axes, dim=-2),
        ]
        if self.needs_total:
            parts.append(self.matrices.complete(col.sum(-1), self.row_axes, self.zero_axes, dim=-1))

        def finish(*sums: Tensor) -> Means:
            left = iter(sums)
            row, col, *total = (part.finish(*(next(left) for _ in part.sums)) for part in parts)
            return Means(row / num_cols, col / num_rows, total[0] / (num_rows * num_cols) if total else None)

        return Combined(tuple(part for request in parts for part in request.sums), finish)

    def normaliser(self, row: Tensor, col: Tensor, total: Tensor | None) -> Tensor:
        """[k] mean of the matrix to which each row belongs, at no cost.

        The mean of a matrix's row means is the mean of its column means: whichever is whole on this rank serves, and
        where neither is, the total that travelled with them.
        """
        if total is not None:
            mean = total
        elif self.row_axes:
            mean = mean_of(row.unflatten(-1, (-1, self.r)))
        else:
            mean = mean_of(col)
        if mean.shape[-1] == 1:
            return mean.expand_as(row)
        index = torch.arange(self.rows.first, self.rows.first + self.rows.count, device=row.device) // self.r
        return mean[..., index - self.matrices.first]

    def operands(self, row: Tensor, col: Tensor) -> tuple[Rows, Columns]:
        """What each row, [k], and each column, [m, c], has, as operands of a `Lazy`."""
        return Rows(row), Columns(col)

    def runs(self, size: int = WHOLE) -> list[Run]:
        """Divide a slice into runs of full structure: at most five, further divided into chunks of about `size` values.

        Part of a row, rows up to the end of a matrix, whole matrices, rows of the last matrix, part of a row; each with
        its matrices, rows and columns.
        """
        if size not in self._runs:
            self._runs[size] = divided(self._whole_runs, size)
        return self._runs[size]

    def views(self, x: Tensor) -> Iterator[tuple[Tensor, Run]]:
        """The undivided runs as views, [matrices, rows, columns]."""
        for run in self._whole_runs:
            yield x[..., run.values].unflatten(-1, run.shape), run

    @functools.cached_property
    def _whole_runs(self) -> list[Run]:
        start, stop = self.layout.span
        at, runs = start, []
        while at < stop:
            row, column = divmod(at, self.c)
            matrix, inside = divmod(row, self.r)
            if column or stop - at < self.c:
                shape = 1, 1, min(self.c - column, stop - at)
            elif inside or stop - at < self.r * self.c:
                shape = 1, min(self.r - inside, (stop - at) // self.c), self.c
            else:
                shape = (stop - at) // (self.r * self.c), self.r, self.c
            size = math.prod(shape)
            rows = slice(row - self.rows.first, row - self.rows.first + shape[0] * shape[1])
            matrices = slice(matrix - self.matrices.first, matrix - self.matrices.first + shape[0])
            columns = slice(column, column + shape[2])
            runs.append(Run(slice(at - start, at - start + size), shape, rows, matrices, columns))
            at += size
        return runs


def mean_of(x: Tensor) -> Tensor:
    """Mean over the last dim; it is finite where the values are, whatever their sum is."""
    return x.div(x.shape[-1]).sum(-1)


@functools.lru_cache(maxsize=4096)
def matrices_of(layout: Layout) -> Matrices:
    """`Matrices(layout)`, made once."""
    return Matrices(layout)
