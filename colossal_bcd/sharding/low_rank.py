"""Low-rank gradients: what a sharded gradient is on a basis, its statistics, and the way back to the weight.

R, C, r, c, n, k as in `sharding.matrix`, for one matrix; q: rank of the basis; A, B: shape of the whole low-rank
gradient; a, b: of this rank's part of it.  Bases have orthonormal columns and are whole on every rank: left [R, q],
right [C, q].  Everything may have a leading dim, of parameters that share the layout.

    right:  G [R, C]  V [C, q]              = [R, q]   a row needs its row of G; a rank has those that begin on it
    left:   U^T [q, R]  G [R, C]            = [q, C]   a column needs all rows; a rank has its share of the columns
    full:   U^T [q, R]  G [R, C]  V [C, q]  = [q, q]   every rank has all of it

A projection is linear: the average of low-rank gradients is the low-rank gradient of the average.  So data-parallel
ranks can project what backward produced and reduce [rank x n] instead of [m x n] (see `LowRankGradient`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from colossal_bcd.sharding.layout import Layout
from colossal_bcd.sharding.lazy import (
    Columns,
    Lazy,
    Number,
    Rows,
    Run,
    as_lazy,
    divided,
    row_and_column_sums,
    subtract_,
)
from colossal_bcd.sharding.matrix import Means, matrices_of, mean_of
from colossal_bcd.sharding.rounds import Combined, Rounds, Sum
from colossal_bcd.sharding.view import ShardView, sum_of_squares

Side = Literal["left", "right", "full"]
CAST_VALUES = 2**22
"""Low-precision values that are cast at once to be projected."""


class LowRank:
    """The layout of a matrix's low-rank gradient: which part of it this rank has, and how it is computed.

    Right projections give a rank the rows that begin on its slice, [a, q].  The sum of a left one is needed everywhere
    to project back, but between steps a rank has its share of the columns only, [q, b].  Full ones are whole.

    Args:
        layout: of a tensor of two dims (see `Layout.as_matrix`).
        side: which sides are projected.
        rank: q.
    """

    def __init__(self, layout: Layout, side: Side, rank: int) -> None:
        self.layout, self.side, self.rank = layout, side, rank
        self._matrices = matrices_of(layout)
        piece = layout.slice
        parts = piece.size if piece is not None and piece.size > 1 else 1
        index = piece.rank if piece is not None else 0
        width = -(-self._matrices.c // parts)
        self.columns = slice(min(index * width, self._matrices.c), min((index + 1) * width, self._matrices.c))
        """Columns of the shard that this rank has, for "left"."""
        touched = self._matrices.rows
        self.rows = slice(touched.first + touched.begun, touched.first + touched.count)
        """Rows of the shard that this rank has, for "right"."""
        self.shape = layout.shape[0] if side == "right" else rank, layout.shape[1] if side == "left" else rank
        """A, B."""
        self.local_shape = (
            self.rows.stop - self.rows.start if side == "right" else rank,
            self.columns.stop - self.columns.start if side == "left" else rank,
        )
        """a, b."""
        self._divided: dict[int, list[Run]] = {}
        # Sums over rows need the ranks that have other rows, sums over columns those that have other columns.
        zero = self._matrices.zero_axes
        self._over_rows = zero + self._matrices.col_axes if side == "right" else ()
        self._over_columns = zero + self._matrices.row_axes if side == "left" else ()

    @property
    def numel(self) -> int:
        """Values of the whole low-rank gradient."""
        return self.shape[0] * self.shape[1]

    def matrix(self, flat: Tensor) -> Tensor:
        """[..., a, b] view of flat values, [..., a * b]."""
        return flat.view(*flat.shape[:-1], *self.local_shape)

    def partial(self, x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        """What this rank's values contribute to the low-rank gradient, in the dtype of the bases.

        Args:
            x: [..., n] values on this rank, of the bases' dtype or a lower precision.
            left: [..., R, q] basis of the rows, for "left" and "full".
            right: [..., C, q] basis of the columns, for "right" and "full".
        Returns:
            [..., k, q] for "right", [..., q, c] for "left", [..., q, q] for "full".
        """
        if self.side == "right":
            v = self._local(right, dim=1)
            parts = [values.to(v.dtype) @ v[..., columns, :] for values, _, columns in self._chunks(x, v.dtype)]
            return parts[0] if len(parts) == 1 else torch.cat([v[..., :0, :], *parts], -2)
        u = self._local(left, dim=0)
        partial = u.new_zeros(*x.shape[:-1], self.rank, self._matrices.c)
        for values, rows, columns in self._chunks(x, u.dtype):
            partial[..., columns] += u[..., rows, :].mT @ values.to(u.dtype)
        return partial if self.side == "left" else partial @ self._local(right, dim=1)

    def project(self, x: Tensor, left: Tensor | None, right: Tensor | None) -> Combined:
        """Request the low-rank gradient of the whole matrix (arguments as of `partial`).

        Returns:
            Request that resolves to this rank's part of it, [..., a, b].
        """
        matrices, partial = self._matrices, self.partial(x, left, right)
        if self.side == "right":
            touched = matrices.rows.complete(partial, matrices.row_axes, matrices.zero_axes, dim=-2)
            return Combined(touched.sums, lambda *sums: touched.finish(*sums)[..., matrices.rows.begun :, :])
        if self.side == "left":
            axes = matrices.zero_axes + matrices.col_axes
            return Combined((Sum(partial, axes),), lambda total: total[..., self.columns].contiguous())
        return Combined((Sum(partial, self.layout.axes),), lambda total: total)

    def complete(self, part: Tensor) -> Sum:
        """Request the low-rank gradient of the whole matrix, from that of each shard.

        Args:
            part: [..., a, b], already added up over the slices.
        Returns:
            Request that resolves to a tensor of the same shape.
        """
        over_columns = self._matrices.row_axes if self.side != "left" else ()
        over_rows = self._matrices.col_axes if self.side != "right" else ()
        return Sum(part, over_columns + over_rows)

    def square_sum(self, x: Tensor | Lazy) -> Sum:
        """Request the squared Euclidean norm of the whole of [..., a * b] complete values, as [..., 1]."""
        return sum_of_squares(x, self._over_rows + self._over_columns, self.runs)

    def means(self, x: Tensor | Lazy) -> Combined:
        """Request the row and column means of the whole low-rank gradient.

        Args:
            x: [..., a * b].
        Returns:
            Request that resolves to `Means` with row [..., a], col [..., b] and no total.
        """
        a, b = self.local_shape
        row, col = row_and_column_sums(x, self.runs, (a, 1, b))
        sums = Sum(row, self._over_columns), Sum(col.squeeze(-2), self._over_rows)
        return Combined(sums, lambda row, col: Means(row / self.shape[1], col / self.shape[0], None))

    def normaliser(self, row: Tensor, col: Tensor, total: Tensor | None) -> Tensor:
        """[..., 1] mean, from the means that are whole on this rank (see `Matrices.normaliser`)."""
        assert total is None
        return mean_of(row if self._over_columns else col).unsqueeze(-1)

    def operands(self, row: Tensor, col: Tensor) -> tuple[Rows, Columns]:
        """What each row, [..., a], and each column, [..., b], has, as operands of a `Lazy`."""
        return Rows(row), Columns(col.unsqueeze(-2))

    def runs(self, size: int) -> list[Run]:
        """The low-rank gradient as one matrix, in chunks of about `size` values."""
        if size not in self._divided:
            a, b = self.local_shape
            whole = Run(slice(0, a * b), (1, a, b), slice(0, a), slice(0, 1), slice(0, b))
            self._divided[size] = divided([whole], size)
        return self._divided[size]

    def whole(self, part: Tensor) -> Combined:
        """Request what this rank needs to project back, from what each rank has: [..., a, b].

        Returns:
            Request that resolves to [..., k, q] for "right", [..., q, c] for "left", [..., q, q] for "full".
        """
        zero = self._matrices.zero_axes
        if self.side == "right":
            return self._matrices.rows.spread(part, zero, dim=-2)
        if self.side != "left" or not zero:
            return Combined((Sum(part, ()),), lambda total: total)
        spread = part.new_zeros(*part.shape[:-1], self._matrices.c)
        spread[..., self.columns] = part
        return Combined((Sum(spread, zero),), lambda total: total)

    def subtract_(
        self,
        x: Tensor,
        step: Tensor,
        left: Tensor | None,
        right: Tensor | None,
        scale: float | Tensor,
        decay: float | Tensor = 0.0,
        decay_first: bool = True,
    ) -> None:
        """Subtract a low-rank step, projected back and scaled, from the values of this rank, in place.

        Args:
            x: [..., n] values on this rank.
            step: what `whole` resolved to.
            left: as of `partial`.
            right: as of `partial`.
            scale: factor.
            decay: as of `View.subtract`.
            decay_first: as of `View.subtract`.
        """
        first = self._matrices.rows.first
        u = self._local(left, dim=0) if self.side != "right" else None
        v = self._local(right, dim=1) if self.side != "left" else None
        keep = 1 - decay
        if isinstance(keep, Tensor) and decay_first:
            x.mul_(keep)
        beta = keep if decay_first and not isinstance(keep, Tensor) else 1.0
        for values, rows, columns in self._runs(x):
            if u is None:
                assert v is not None
                factors = step[..., rows.start - first : rows.stop - first, :], v[..., columns, :].mT
            elif v is None:
                factors = u[..., rows, :], step[..., columns]
            else:
                factors = u[..., rows, :] @ step, v[..., columns, :].mT
            _subtract_product_(values, *factors, scale, beta)
        if not decay_first and (isinstance(keep, Tensor) or keep != 1):
            x.mul_(keep)

    def _chunks(self, x: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, slice, slice]]:
        """`_runs`, divided further where they have to be cast, so that no whole copy in `dtype` exists."""
        for values, rows, columns in self._runs(x):
            length = values.shape[-2]
            if x.dtype != dtype:
                length = max(CAST_VALUES // max(math.prod(values.shape[:-2]) * values.shape[-1], 1), 1)
            for start in range(0, values.shape[-2], length):
                stop = min(start + length, values.shape[-2])
                yield values[..., start:stop, :], slice(rows.start + start, rows.start + stop), columns

    def _local(self, basis: Tensor | None, dim: int) -> Tensor:
        """The rows of a basis that belong to this rank's shard along a dim."""
        assert basis is not None
        if self.layout.split is None or self.layout.split.dim != dim:
            return basis
        return basis.index_select(-2, self.layout.indices(dim, basis.device))

    def _runs(self, x: Tensor) -> Iterator[tuple[Tensor, slice, slice]]:
        """Runs of full structure as views [..., rows, columns], with their rows and columns in this rank's shard."""
        first = self._matrices.rows.first
        for values, run in self._matrices.views(x):
            yield values.flatten(-3, -2), slice(run.rows.start + first, run.rows.stop + first), run.columns


def _subtract_product_(x: Tensor, left: Tensor, right: Tensor, scale: float | Tensor, keep: float) -> None:
    """keep * x - scale * left @ right, in place; where all have one dtype, no product as large as `x` is made."""
    if x.dtype != left.dtype or isinstance(scale, Tensor) or x.dim() > 3:
        if keep != 1:
            x.mul_(keep)
        x.sub_((left @ right).mul_(scale))
    elif x.dim() == 2:
        x.addmm_(left, right, alpha=-scale, beta=keep)
    else:
        x.baddbmm_(left, right, alpha=-scale, beta=keep)


# Layers have equal layouts, and every step asks again.
@lru_cache(maxsize=4096)
def low_rank_of(layout: Layout, side: Side, rank: int) -> LowRank:
    """`LowRank(layout, side, rank)`, made once."""
    return LowRank(layout, side, rank)


@lru_cache(maxsize=4096)
def _by_slice(layout: Layout, side: Side, rank: int) -> tuple[LowRank, ...]:
    """The parts of all ranks of the slice's axis, in their order."""
    if layout.slice is None:
        return (low_rank_of(layout, side, rank),)
    return tuple(low_rank_of(layout.at(slice_rank=index), side, rank) for index in range(layout.slice.size))


Record: TypeAlias = Callable[[Tensor, "float | Tensor", bool], None]
"""Takes a low-rank step [..., a, b], the decay, and whether it comes first."""


class LowRankView:
    """A parameter's low-rank gradient as a rule sees it (see `View`).

    Args:
        weight: the parameter.
        low_rank: layout of the gradient.
        bases: left and right.
        gradient: [..., a, b] complete, as `LowRank.project` resolves.
        scale: factor of the step that is projected back.
        record: takes the step where somebody else applies it; None: it is projected back and subtracted here.
    """

    def __init__(
        self,
        weight: ShardView,
        low_rank: LowRank,
        bases: tuple[Tensor | None, Tensor | None],
        gradient: Tensor,
        scale: float,
        record: Record | None = None,
    ) -> None:
        self.weight, self.grad, self.statistics = weight, gradient.flatten(-2), low_rank
        self.stored_grad = self.grad
        self._bases, self._scale, self._record = bases, scale, record

    @property
    def numel(self) -> int:
        """Values of the whole low-rank gradient."""
        return self.statistics.numel

    def square_sum(self, x: Tensor | Lazy) -> Sum:
        """See `View`."""
        return self.statistics.square_sum(x)

    def subtract(
        self, step: Tensor | Lazy, *, lr: Number = 1.0, decay: Number = 0.0, decay_first: bool = True
    ) -> Rounds:
        """See `View`; one round spreads the step to the ranks that need it."""
        scaled = torch.zeros_like(self.grad)
        subtract_(scaled, as_lazy(step), self.statistics.runs, lr=-lr)
        part = self.statistics.matrix(scaled)
        if self._record is not None:
            self._record(part, decay, decay_first)
            return
        (spread,) = yield (self.statistics.whole(part),)
        self.statistics.subtract_(self.weight.param, spread, *self._bases, self._scale, decay, decay_first)


@dataclass(frozen=True, eq=False)
class LowRankGradient:
    """What an optimizer wants of one parameter's gradient at its next step: its projection on these bases.

    r, c: the tensor-parallel shard as a matrix; W: data-parallel ranks, which divide the shard into slices.
    """

    layout: Layout
    """Of the parameter on this rank, as a matrix (see `Layout.as_matrix`)."""
    side: Side
    rank: int
    left: Tensor | None
    right: Tensor | None
    """Bases [R, q], [C, q] of the whole matrix, the same on all ranks, float32 or wider."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the shard's low-rank gradient: [r, q] for "right", [q, c] for "left", [q, q] for "full"."""
        return self.of_shard.local_shape

    @property
    def numel(self) -> int:
        """Values of the shard's low-rank gradient."""
        return math.prod(self.shape)

    @property
    def divided(self) -> bool:
        """Whether each of the W ranks needs a part only."""
        return self.side != "full"

    @cached_property
    def part_numel(self) -> int:
        """Values of the largest rank's part, where the low-rank gradient is divided."""
        return max(math.prod(part.local_shape) for part in self._slices)

    def of(self, grad: Tensor) -> Tensor:
        """Low-rank gradient of this rank's shard, flat, in the dtype of the bases.

        A low-precision gradient is cast, not the bases: bfloat16 bases would be orthonormal to 2^-8 only.

        Args:
            grad: gradient of the working parameter, of the shard's shape.
        """
        left, right = (None if basis is None else basis.to(grad.device) for basis in (self.left, self.right))
        flat = grad.reshape(-1)[: self.of_shard.layout.num_local]
        return self.of_shard.partial(flat, left, right).reshape(-1)

    def rows(self, flat: Tensor) -> Tensor:
        """[W, part_numel] what each rank needs of the shard's low-rank gradient, padded with zeros."""
        matrix = flat.view(self.shape)
        buffer = matrix.new_zeros(len(self._slices), self.part_numel)
        for row, part in zip(buffer, self._slices, strict=True):
            row[: math.prod(part.local_shape)] = self._part(matrix, part).reshape(-1)
        return buffer

    def of_slice(self, flat: Tensor, *, partitioned: bool) -> Tensor:
        """[a, b] this rank's part.

        Args:
            flat: this rank's row of `rows` if `partitioned`, else the low-rank gradient of the shard.
            partitioned: which of the two `flat` is.
        """
        part = low_rank_of(self.layout, self.side, self.rank)
        if partitioned:
            return flat[: math.prod(part.local_shape)].view(part.local_shape)
        return self._part(flat.view(self.shape), part).contiguous()

    def complete(self, part: Tensor) -> Sum:
        """Request the low-rank gradient of the whole matrix: shards along a projected dim are added up."""
        return low_rank_of(self.layout, self.side, self.rank).complete(part)

    def square_sum(self, part: Tensor) -> Sum:
        """Request the squared norm of the whole, [1], from the complete part on each rank, [a, b]."""
        return low_rank_of(self.layout, self.side, self.rank).square_sum(part.reshape(-1))

    def joined(self, rows: Tensor) -> Tensor:
        """The shard's low-rank gradient, from what each rank has of it.

        Args:
            rows: [W, part_numel] by rank, as `padded` makes them.
        """
        matrix = rows.new_zeros(self.shape)
        for row, part in zip(rows, self._slices, strict=True):
            self._part(matrix, part).copy_(row[: math.prod(part.local_shape)].view(part.local_shape))
        return matrix

    def padded(self, part: Tensor) -> Tensor:
        """[part_numel] this rank's part, as long as the longest rank's."""
        return torch.nn.functional.pad(part.reshape(-1), (0, self.part_numel - part.numel()))

    @cached_property
    def of_shard(self) -> LowRank:
        """The projection of the whole shard."""
        return low_rank_of(self.layout.unsliced, self.side, self.rank)

    def _part(self, matrix: Tensor, part: LowRank) -> Tensor:
        if self.side == "right":
            return matrix[part.rows]
        return matrix[:, part.columns] if self.side == "left" else matrix

    @cached_property
    def _slices(self) -> tuple[LowRank, ...]:
        return _by_slice(self.layout, self.side, self.rank)


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
