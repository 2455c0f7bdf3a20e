"""Products of a sharded matrix with a basis: projection to low rank and back.

R, C, r, c, n, k as in `sharding.matrix`, for one matrix; b: rows that begin on this rank; q: rank of the basis.  Bases
have orthonormal columns and are whole on every rank: left [R, q], right [C, q].
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from colossal_bcd.sharding.layout import Layout
from colossal_bcd.sharding.matrix import matrices_of
from colossal_bcd.sharding.rounds import Combined, Sum
from colossal_bcd.sharding.view import sum_of_squares

Side = Literal["left", "right", "full"]
CAST_VALUES = 2**22
"""Low-precision values that are cast at once to be projected."""


class LowRank:
    """The low-rank image of one matrix under a layout, on one rank.

    - right, G V: a row needs that row only.  Held are the rows that begin on the rank's slice, [b, q].
    - left, U^T G: every column needs all rows.  The sum over ranks is needed everywhere, but held is only this rank's
      share of the columns, [q, w].
    - full, U^T G V: [q, q], everywhere.

    Args:
        layout: of a tensor of two dims (see `Layout.as_matrix`).
        side: see above.
        rank: q.
    """

    def __init__(self, layout: Layout, side: Side, rank: int) -> None:
        self._layout, self._side, self._rank = layout, side, rank
        self._matrices = matrices_of(layout)
        piece = layout.slice
        parts = piece.size if piece is not None and piece.size > 1 else 1
        place = piece.rank if piece is not None else 0
        width = -(-self._matrices.c // parts)
        self._columns = slice(min(place * width, self._matrices.c), min((place + 1) * width, self._matrices.c))
        self._shared_by: tuple[str, ...] = (piece.axis,) if piece is not None and parts > 1 else ()

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of what this rank holds of the image."""
        if self._side == "right":
            return self.rows.stop - self.rows.start, self._rank
        if self._side == "left":
            return self._rank, self._columns.stop - self._columns.start
        return self._rank, self._rank

    @property
    def columns(self) -> slice:
        """Columns of the shard whose image this rank holds; for "left"."""
        return self._columns

    @property
    def rows(self) -> slice:
        """Rows of the shard whose image this rank holds; for "right"."""
        rows = self._matrices.rows
        return slice(rows.first + rows.begun, rows.first + rows.count)

    def partial(self, x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        """What this rank's values contribute to the image, in the dtype of the bases.

        Args:
            x: [n] values on this rank, of the bases' dtype or a lower precision.
            left: [R, q] basis of the rows, for "left" and "full".
            right: [C, q] basis of the columns, for "right" and "full".
        Returns:
            [k, q] for "right", [q, c] for "left", [q, q] for "full".
        """
        matrices = self._matrices
        if self._side == "right":
            v = self._local(right, dim=1)
            parts = [block.to(v.dtype) @ v[columns] for block, _, columns in self._chunks(x, v.dtype)]
            return parts[0] if len(parts) == 1 else torch.cat([v.new_zeros(0, self._rank), *parts])
        u = self._local(left, dim=0)
        partial = u.new_zeros(self._rank, matrices.c)
        for block, rows, columns in self._chunks(x, u.dtype):
            partial[:, columns] += u[rows].T @ block.to(u.dtype)
        return partial if self._side == "left" else partial @ self._local(right, dim=1)

    def project(self, x: Tensor, left: Tensor | None, right: Tensor | None) -> Combined:
        """Request the image of the whole matrix.

        Args:
            x: see `partial`.
            left: see `partial`.
            right: see `partial`.
        Returns:
            Request that resolves to what this rank holds of the image, of `shape`.
        """
        matrices, partial = self._matrices, self.partial(x, left, right)
        if self._side == "right":
            touched = matrices.rows.complete(partial, matrices.row_axes, matrices.zero_axes)
            return Combined(touched.sums, lambda *sums: touched.finish(*sums)[matrices.rows.begun :])
        if self._side == "left":
            return Combined(
                (Sum(partial, matrices.zero_axes + matrices.col_axes),),
                lambda total: total[:, self._columns].contiguous(),
            )
        return Combined((Sum(partial, self._layout.axes),), lambda total: total)

    def complete(self, held: Tensor) -> Sum:
        """Request the image of the whole matrix, from that of each shard, already added up over the slices.

        Args:
            held: of `shape`.
        Returns:
            Request that resolves to a tensor of `shape`.
        """
        matrices = self._matrices
        over_columns = matrices.row_axes if self._side != "left" else ()
        over_rows = matrices.col_axes if self._side != "right" else ()
        return Sum(held, over_columns + over_rows)

    def square_sum(self, held: Tensor) -> Sum:
        """Request the squared Euclidean norm of the whole image.

        Args:
            held: of `shape`, complete.
        Returns:
            Request that resolves to a scalar.
        """
        matrices = self._matrices
        over = {"right": matrices.col_axes, "left": matrices.row_axes}
        axes = matrices.zero_axes + over[self._side] if self._side in over else ()
        return sum_of_squares(held.reshape(-1), axes)

    def whole(self, held: Tensor) -> Combined:
        """Request what this rank needs of an image to project it back, from what each rank holds of it.

        Args:
            held: of `shape`.
        Returns:
            Request that resolves to [k, q] for "right", [q, c] for "left", [q, q] for "full".
        """
        if self._side == "right":
            return self._matrices.rows.spread(held, self._matrices.zero_axes)
        if self._side != "left" or not self._shared_by:
            return Combined((Sum(held, ()),), lambda total: total)
        spread = held.new_zeros(self._rank, self._matrices.c)
        spread[:, self._columns] = held
        return Combined((Sum(spread, self._shared_by),), lambda total: total)

    def subtract_(
        self, x: Tensor, image: Tensor, left: Tensor | None, right: Tensor | None, scale: float | Tensor
    ) -> None:
        """Subtract the image, projected back and scaled, from the values of this rank, in place.

        Args:
            x: [n] values on this rank.
            image: what `whole` resolved to.
            left: see `project`.
            right: see `project`.
            scale: factor.
        """
        u = self._local(left, dim=0) if self._side != "right" else None
        v = self._local(right, dim=1) if self._side != "left" else None
        for block, rows, columns in self._blocks(x):
            if self._side == "right":
                assert v is not None
                block.sub_((image[self._held(rows)] @ v[columns].T) * scale)
            elif self._side == "left":
                assert u is not None
                block.sub_((u[rows] @ image[:, columns]) * scale)
            else:
                assert u is not None
                assert v is not None
                block.sub_((u[rows] @ image @ v[columns].T) * scale)

    def _chunks(self, x: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, slice, slice]]:
        """`_blocks`, cut into runs of rows where they have to be cast, so that no whole copy in `dtype` exists."""
        if x.dtype == dtype:
            return self._blocks(x)
        chunks = []
        for block, rows, columns in self._blocks(x):
            length = max(CAST_VALUES // max(block.shape[1], 1), 1)
            for at, part in zip(range(rows.start, rows.stop, length), block.split(length), strict=True):
                chunks.append((part, slice(at, at + len(part)), columns))
        return chunks

    def _held(self, rows: slice) -> slice:
        first = self._matrices.rows.first
        return slice(rows.start - first, rows.stop - first)

    def _local(self, basis: Tensor | None, dim: int) -> Tensor:
        """The rows of a basis that belong to this rank's shard along a dim."""
        assert basis is not None
        if self._layout.split is None or self._layout.split.dim != dim:
            return basis
        return basis[self._layout.indices(dim).to(basis.device)]

    def _blocks(self, x: Tensor) -> list[tuple[Tensor, slice, slice]]:
        """Blocks of full structure as views [rows, columns], with their rows and columns in this rank's shard."""
        first = self._matrices.rows.first
        return [
            (values.flatten(0, 1), slice(rows.start + first, rows.stop + first), columns)
            for values, rows, _, columns in self._matrices.pieces(x)
        ]


def side_of(shape: tuple[int, ...], projection: str) -> Side:
    """The side on which a global matrix is projected.

    Args:
        shape: R, C.
        projection: "std" projects the shorter dim, "reverse_std" the longer one; "left", "right" and "full" say it.
    """
    if projection == "std":
        return "right" if shape[0] >= shape[1] else "left"
    if projection == "reverse_std":
        return "left" if shape[0] >= shape[1] else "right"
    assert projection in ("left", "right", "full")
    return projection  # type: ignore[return-value]


def cost_of_basis(shape: tuple[int, ...]) -> int:
    """Operations of a singular value decomposition, up to a factor; owners are balanced by it."""
    return math.prod(shape) * min(shape)
